# ruff: noqa: E501
"""Programs that try to break out of the sandbox, and programs that people write. An attack that reaches its goal returns ESCAPED.

`item` tells an attack where its targets are: port, udp, abstract, socket, folder (anyone may write there), file (anyone may read it), pid.
"""

ESCAPED = 666.0
_RAW = "import ctypes, os\nsyscall = ctypes.CDLL(None, use_errno=True).syscall\n"


def _attack(body: str, *, prelude: str = "import os, socket, sys\n", escaped: str = "    return 666.0\n") -> str:
    return prelude + "def grade(sample, item):\n" + "".join(f"    {line}\n" for line in body.splitlines()) + escaped


def _raw(*calls: str) -> str:
    """Escaped when any of these system calls is answered without an error."""
    return _attack(f"return 666.0 if any(syscall(*call) >= 0 for call in [{', '.join(calls)}]) else 0.0", prelude=_RAW, escaped="")


def _hangs(body: str, prelude: str = "") -> str:
    return _attack(body, prelude=prelude)


NETWORK = {
    "TCP": _attack("socket.create_connection(('127.0.0.1', item['port']), 2)"),
    "UDP": _attack("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', item['udp']))"),
    "abstract unix socket": _attack("socket.socket(socket.AF_UNIX).connect('\\0' + item['abstract'])"),
    "unix socket in a folder": _attack("socket.socket(socket.AF_UNIX).connect(item['socket'])"),
    "listen": _attack("socket.create_server(('127.0.0.1', 0))"),
    "name look-up": _attack("socket.getaddrinfo('localhost', 80)\nsocket.gethostbyname('example.com')"),
    "urllib": _attack("import urllib.request\nurllib.request.urlopen(f\"http://127.0.0.1:{item['port']}\", timeout=2)"),
    "raw sockets": _raw("(41, 2, 1, 0)", "(41, 2, 2, 0)", "(41, 16, 3, 0)", "(41, 17, 3, 0)", "(53, 1, 1, 0, (ctypes.c_int * 2)())"),
    "io_uring": _raw("(425, 8, ctypes.create_string_buffer(256))"),
}
FILES = {
    "read a file": _attack("assert open(item['file']).read()"),
    "os.open": _attack("os.read(os.open(item['file'], os.O_RDONLY), 10)"),
    "FileIO": _attack("import io\nio.FileIO(item['file']).read()"),
    "module loader": _attack("import json\njson.__loader__.get_data(item['file'])"),
    "write a file": _attack("open(item['folder'] + '/written', 'w').write('x')"),
    "append to a file": _attack("open(item['folder'] + '/canary', 'a').write('x')"),
    "list a folder": _attack("os.listdir('/')"),
    "stat": _attack("os.stat(item['file'])"),
    "access": _attack("assert os.access(item['file'], os.R_OK)"),
    "make a folder": _attack("os.mkdir(item['folder'] + '/made')"),
    "remove a file": _attack("os.unlink(item['folder'] + '/canary')"),
    "rename a file": _attack("os.rename(item['folder'] + '/canary', item['folder'] + '/renamed')"),
    "symlink": _attack("os.symlink('/etc/passwd', item['folder'] + '/link')"),
    "hard link": _attack("os.link(item['folder'] + '/canary', item['folder'] + '/hard')"),
    "chmod": _attack("os.chmod(item['folder'] + '/canary', 0o777)"),
    "truncate": _attack("os.truncate(item['folder'] + '/canary', 0)"),
    "touch": _attack("os.utime(item['folder'] + '/canary', (1, 1))"),
    "fifo": _attack("os.mkfifo(item['folder'] + '/fifo')"),
    "chdir": _attack("os.chdir('/tmp')\nos.chdir('/')"),
    "temporary file": _attack("import tempfile\ntempfile.TemporaryFile()"),
    "memory file": _attack("os.memfd_create('x')"),
    "shared memory": _raw("(29, 0, 4096, 0o1777)", "(68, 0, 0o1777)", "(240, b'/q', 0o101, 0o666, None)"),
    "mount and chroot": _raw("(165, b'none', b'/tmp', b'tmpfs', 0, None)", "(161, b'/')", "(155, b'/', b'/')"),
}
SECRETS = {
    "environment": _attack("assert any('HONE' in name or 'SECRET' in name for name in os.environ)"),
    "environment in C": _attack("import ctypes\nassert ctypes.CDLL(None).getenv(b'HONE_TEST_SECRET')"),
    "/proc/self/environ": _attack("open('/proc/self/environ', 'rb').read()"),
    "the grader's environment": _attack("open(f\"/proc/{item['pid']}/environ\", 'rb').read()"),
    "the grader's memory": _attack("open(f\"/proc/{item['pid']}/mem\", 'rb').seek(0)"),
    "the sandbox's own start": _attack("open(f'/proc/{os.getppid()}/cmdline', 'rb').read()\nopen('/proc/self/cmdline', 'rb').read()"),
    "open descriptors": _attack(
        "def is_open(number):\n    try:\n        os.fstat(number)\n    except OSError:\n        return False\n    return True\n"
        "return 666.0 if sum(map(is_open, range(3, 4096))) > 1 else 0.0"
    ),
    "objects of the garbage collector": _attack(
        "import gc\nwanted = 'tenorivne-eht-ni-terc3s'[::-1]\n"
        "found = [o for o in gc.get_objects() if type(o) in (dict, list, tuple) and o is not sys._getframe().f_locals and wanted in repr(o)[:5000]]\n"
        "return 666.0 if len(found) > 1 else 0.0"
    ),
    "frames": _attack(
        "frame, names = sys._getframe(), []\nwhile frame:\n    names += [*frame.f_globals, *frame.f_locals]\n    frame = frame.f_back\n"
        "assert any('secret' in name.lower() and name != 'secrets' for name in names)"
    ),
    "memory of the grader by process_vm_readv": _attack(
        "import ctypes\nbuffer = ctypes.create_string_buffer(8)\nvector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)\n"
        "assert ctypes.CDLL(None).process_vm_readv(item['pid'], vector, 1, vector, 1, 0) > 0"
    ),
    "keyrings": _raw("(250, 0, -4, 1)", "(248, b'user', b'x', b'y', 1, -4)"),
}
PROCESSES = {
    "fork": _attack("if os.fork() == 0:\n    os._exit(0)"),
    "fork bomb": _attack("while True:\n    try:\n        os.fork()\n    except RuntimeError:\n        pass"),
    "raw fork, vfork, clone": _raw("(57,)", "(58,)", "(56, 17, 0, 0, 0, 0)", "(435, ctypes.create_string_buffer(88), 88)"),
    "exec": _attack("os.execv('/bin/sh', ['sh', '-c', 'true'])"),
    "posix_spawn": _attack("os.posix_spawn('/bin/true', ['true'], {})"),
    "os.system": _attack("assert os.system('true') == 0"),
    "popen": _attack("assert os.popen('echo hi').read()"),
    "subprocess": _attack("import subprocess\nsubprocess.run(['/bin/true'])"),
    "multiprocessing": _attack("import multiprocessing\nmultiprocessing.Process(target=print).start()"),
    "thread": _attack("import threading\nthreading.Thread(target=print).start()"),
    "signal to the grader": _attack("os.kill(item['pid'], 15)"),
    "is the grader there": _attack("os.kill(item['pid'], 0)"),
    "kill the supervisor": _attack("os.kill(os.getppid(), 9)"),
    "kill everything": _attack("os.kill(-1, 9)"),
    "kill the group": _attack("os.killpg(0, 9)"),
    "kill by pidfd, tgkill, sigqueue": _raw("(434, os.getpid(), 0)", "(234, os.getpid(), os.getpid(), 0)", "(129, os.getpid(), 0, None)"),
    "ptrace": _attack("import ctypes\nassert ctypes.CDLL(None).ptrace(16, item['pid'], 0, 0) == 0"),
    "leave the session": _attack("os.setsid()"),
    "root again": _attack("os.setuid(0)\nos.seteuid(0)\nos.setgroups([0])"),
    "raise the limits": _attack("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    "namespaces": _raw("(272, 0x10000000)", "(272, 0x40000000)", "(308, 0, 0)"),
    "outlive the supervisor": _raw("(157, 1, 0, 0, 0, 0)", "(157, 36, 1, 0, 0, 0)"),
    "debugging the kernel": _raw("(321, 0, None, 0)", "(298, None, 0, -1, -1, 0)", "(323, 0)", "(103, 2, None, 0)"),
    "machine code": _raw("(9, 0, 4096, 7, 0x22, -1, 0)", "(9, 0, 4096, 5, 0x22, -1, 0)"),
    "memory made executable": _attack(
        "memory = syscall(9, 0, 4096, 3, 0x22, -1, 0)\nassert syscall(10, ctypes.c_long(memory), 4096, 7) == 0", prelude=_RAW
    ),
    "calls of another ABI": _raw("(0x40000000 + 41, 2, 1, 0)", "(0x40000000 + 57,)"),
}
TIME_AND_MEMORY = {
    "endless loop": _hangs("while True:\n    pass"),
    "endless loop on loading": "while True:\n    pass\ndef grade(sample, item):\n    return 666.0",
    "loop that catches everything": _hangs("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "sleep": _hangs("while True:\n    time.sleep(3600)", "import time\n"),
    "signals ignored": _hangs(
        "for number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\n"
        "while True:\n    sum(range(1000))",
        "import signal\n",
    ),
    "lock that nobody opens": _hangs("lock = threading.Lock()\nlock.acquire()\nlock.acquire()", "import threading\n"),
    "exploding regular expression": _hangs("re.match('(a+)+$', 'a' * 60 + 'b')\nreturn 0.0", "import re\n"),
    "exploding integer": _hangs("return float(len(str(10 ** 10 ** 9)))"),
    "sorting with a comparison that never ends": _hangs(
        "class Slow:\n    def __lt__(self, other):\n        while True: pass\nreturn float(len(sorted([Slow(), Slow()])))"
    ),
    "memory at once": _attack("kept = bytearray(3 << 30)\nkept[::4096] = b'x' * len(kept[::4096])"),
    "memory in pieces": _attack("kept = []\nwhile True:\n    kept.append(bytearray(100_000))"),
    "memory by mmap": _raw("(9, 0, 3 << 30, 3, 0x22, -1, 0)"),
    "billion laughs": _attack("text = 'x'\nwhile True:\n    text = text + text"),
    "recursion": _attack("def f(n): return f(n + 1)\nf(0)"),
    "recursion in C": _attack("sys.setrecursionlimit(10 ** 9)\nclass A: pass\ndef f(): return f()\nf()"),
    "nested literal": "grade = " + "(" * 5000 + "1" + ")" * 5000,
    "null pointer": _attack("ctypes.string_at(0)", prelude="import ctypes\n"),
    "broken bytecode": _attack(
        "code = (lambda: None).__code__\n(lambda: None).__class__(code.replace(co_code=b'\\x64\\xff' * 50, co_consts=()), {})()"
    ),
    "exit": _attack("os._exit(0)"),
    "abort": _attack("os.abort()"),
    "interpreter's exit": _attack("sys.exit(0)"),
    "interrupt": _attack("raise KeyboardInterrupt"),
}
OUTPUT = {
    "endless output": _hangs("while True:\n    print('x' * 100_000)\n    sys.stderr.write('y' * 100_000)", "import sys\n"),
    "flooded answer": _hangs(
        "while True:\n    for number in range(3, 16):\n        try:\n            os.write(number, b'x' * 65536)\n"
        "        except OSError:\n            pass",
        "import os\n",
    ),
    "answer that is none": _attack(
        "for number in range(3, 16):\n    try:\n        os.write(number, b'[1, 2')\n    except OSError:\n        pass\nos._exit(0)"
    ),
    "answer with a wrong type": _attack(
        "for number in range(3, 16):\n    try:\n        os.write(number, b'{\"value\": [666]}')\n    except OSError:\n        pass\nos._exit(0)"
    ),
    "answer nested without end": _attack(
        "for number in range(3, 16):\n    try:\n        os.write(number, b'[' * 60000)\n    except OSError:\n        pass\nos._exit(0)"
    ),
    "answer, then no end": _hangs(
        "for number in range(3, 16):\n    try:\n        os.write(number, b'{\"value\": 666}')\n    except OSError:\n        pass\nwhile True: pass",
        "import os\n",
    ),
    "descriptor passed on": _attack("socket.socket(fileno=3).sendmsg([b'x'])\nsocket.socket(fileno=4).sendmsg([b'x'])"),
    "descriptors copied": _attack("for number in range(100):\n    os.dup(1)"),
    "error with a huge text": _attack("raise ValueError('x' * 50_000_000)"),
    "error whose text never ends": _hangs("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"),
    "NaN": _attack("return float('nan')"),
    "infinity": _attack("return float('inf')"),
    "huge integer": _attack("return 10 ** 100_000"),
    "text": _attack("return '666'"),
    "nothing": _attack("return None"),
    "true": _attack("return True"),
    "list that holds itself": _attack("value = []\nvalue.append(value)\nreturn value"),
    "object with a hostile __float__": _attack("class F:\n    def __float__(self): os._exit(0)\n    __index__ = __float__\nreturn F()"),
    "float with hostile comparisons": _attack(
        "class F(float):\n    def __eq__(self, other): os._exit(0)\n    __float__ = __repr__ = __hash__ = __lt__ = __eq__\nreturn F(666)"
    ),
    "type with a hostile name": _attack(
        "class M(type):\n    @property\n    def __name__(self): raise SystemExit(0)\nclass A(metaclass=M): pass\nreturn A()"
    ),
}
PYTHON = {
    "class climb": _attack(
        "for kind in ().__class__.__base__.__subclasses__():\n    if kind.__name__ in ('Popen', '_wrap_close'):\n"
        "        kind.__init__.__globals__['sys'].modules['os'].listdir('/')"
    ),
    "frames up to the loader": _attack("sys._getframe(2).f_globals['os'].listdir('/')\nsys._getframe(2).f_globals['confine']"),
    "pickle": _attack("import pickle\npickle.loads(b'cos\\nmkdir\\n(V' + (item['folder'] + '/pickled').encode() + b'\\ntR.')"),
    "our own code": _attack("import graders.build"),
    "other packages": _attack("import numpy"),
    "import path": _attack("sys.path.insert(0, item['folder'])\nimport canary_module"),
    "import machinery": _attack(
        "import importlib.machinery\nimportlib.machinery.SourceFileLoader('m', item['folder'] + '/canary_module.py').load_module()"
    ),
    "modules unloaded and loaded anew": _attack("for name in list(sys.modules):\n    del sys.modules[name]\nimport ssl\nimport json.tool"),
    "audit hook": _attack("def hook(event, arguments):\n    raise SystemExit\nsys.addaudithook(hook)\nopen(item['file'])"),
    "trace function": _hangs("def trace(*_): return trace\nsys.settrace(trace)\nwhile True: pass", "import sys\n"),
    "at exit": _attack("import atexit\natexit.register(lambda: open(item['folder'] + '/exit', 'w'))\nreturn 0.0"),
    "finalizer": "class A:\n    def __del__(self):\n        while True: pass\nkept = A()\ndef grade(sample, item):\n    return 0.0",
    "our functions replaced": _attack(
        "import json\njson.dumps = lambda *_: 'not json'\njson.JSONEncoder.encode = json.dumps\nsys.modules['json'].dumps = json.dumps"
    ),
}
ATTACKS = {**NETWORK, **FILES, **SECRETS, **PROCESSES, **TIME_AND_MEMORY, **OUTPUT, **PYTHON}

BENIGN: dict[str, tuple[str, float]] = {
    "json": ("import json\ndef grade(s, i):\n    return json.loads('{\"x\": 0.25}')['x']", 0.25),
    "re": ("import re\ndef grade(s, i):\n    return float(re.findall(r'-?\\d+', s['output_text'])[-1] == i['answer'])", 1.0),
    "math": ("import math\ndef grade(s, i):\n    return math.exp(-abs(float(s['output_text']) - 4))", 1.0),
    "statistics": ("import statistics\ndef grade(s, i):\n    return statistics.median([1, 2, 9])", 2.0),
    "difflib": ("import difflib\ndef grade(s, i):\n    return difflib.SequenceMatcher(None, 'abcd', 'bcde').ratio()", 0.75),
    "strings": ("import string\ndef grade(s, i):\n    return len(' a,B '.strip().casefold().translate(str.maketrans('', '', ',')))", 2.0),
    "dataclasses": (
        "from dataclasses import dataclass, field\n@dataclass\nclass A:\n    x: 'float'\n    y: list = field(default_factory=list)\n"
        "def grade(s, i):\n    return A(0.5).x",
        0.5,
    ),
    "collections": ("from collections import Counter, defaultdict\ndef grade(s, i):\n    return Counter('aab')['a'] / 4", 0.5),
    "itertools": ("import itertools\ndef grade(s, i):\n    return len(list(itertools.permutations('abc')))", 6.0),
    "functools": (
        "import functools\n@functools.lru_cache\ndef f(n):\n    return n if n < 2 else f(n-1) + f(n-2)\ndef grade(s, i):\n    return f(30)",
        832040.0,
    ),
    "inheritance": (
        "class A:\n    x = 1\nclass B(A):\n    def y(self):\n        return super().x if False else self.x\ndef grade(s, i):\n    return B().y()",
        1.0,
    ),
    "generators": ("def g():\n    yield from (1, 2, 3)\ndef grade(s, i):\n    return sum(g())", 6.0),
    "enum": ("from enum import Enum\nclass C(Enum):\n    A = 1\ndef grade(s, i):\n    return C(1).value", 1.0),
    "fractions and decimal": (
        "from fractions import Fraction\nfrom decimal import Decimal\ndef grade(s, i):\n    return float(Fraction('1/4')) + float(Decimal('0.5'))",
        0.75,
    ),
    "exceptions": (
        "def grade(s, i):\n    try:\n        return float(i['missing'])\n    except KeyError as error:\n        return 0.1",
        0.1,
    ),
    "ast": ("import ast\ndef grade(s, i):\n    return ast.literal_eval('[1, 2]')[1]", 2.0),
    "exec": ("def grade(s, i):\n    names = {}\n    exec('def f(x): return x + 1', names)\n    return names['f'](1)", 2.0),
    "hashlib": ("import hashlib\ndef grade(s, i):\n    return int(hashlib.sha256(b'a').hexdigest()[:2], 16)", 202.0),
    "xml and html": (
        "import html, xml.etree.ElementTree as tree\ndef grade(s, i):\n    return float(tree.fromstring(html.unescape('&lt;a&gt;3&lt;/a&gt;')).text)",
        3.0,
    ),
    "csv and io": ("import csv, io\ndef grade(s, i):\n    return float(list(csv.reader(io.StringIO('1,2')))[0][1])", 2.0),
    "datetime": ("from datetime import date\ndef grade(s, i):\n    return (date(2024, 3, 1) - date(2024, 2, 1)).days", 29.0),
    "random, the same each time": (
        "import random\ndef grade(s, i):\n    return float(random.Random(0).random() < 1) + random.random() * 0",
        1.0,
    ),
    "order of a set": ("def grade(s, i):\n    return float(sorted({'a', 'b', 'c'}) == ['a', 'b', 'c'])", 1.0),
    "heapq and bisect": (
        "import heapq, bisect\ndef grade(s, i):\n    return heapq.nsmallest(1, [3, 1])[0] + bisect.bisect([1, 2], 1)",
        2.0,
    ),
    "unittest": (
        "import io, unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(1, 1)\n"
        "def grade(s, i):\n    suite = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
        "    return float(unittest.TextTestRunner(stream=io.StringIO()).run(suite).wasSuccessful())",
        1.0,
    ),
    "prints": ("def grade(s, i):\n    print('hello', s)\n    return 1", 1.0),
    "unicode": ("import unicodedata\ndef grade(s, i):\n    return float(unicodedata.normalize('NFC', 'e\\u0301') == '\\u00e9')", 1.0),
    "time": (
        "import time\ndef grade(s, i):\n    started = time.monotonic()\n    time.sleep(0.01)\n    return float(time.monotonic() >= started)",
        1.0,
    ),
    "timer": (
        "import signal\ndef stop(*_):\n    raise TimeoutError\ndef grade(s, i):\n    signal.signal(signal.SIGALRM, stop)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    try:\n        while True: sum(range(10))\n    except TimeoutError:\n        return 0.5",
        0.5,
    ),
}
