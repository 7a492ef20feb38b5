"""What the demo prints at the end."""

from collections.abc import Iterable
from typing import Any

from examples.demo.comparison import Comparison
from examples.demo.prompts import Row, text_of

MAX_SHOWN = 100
NUM_SHOWN = 3
BY_HAND = """
The same by hand, in a shell with .venv activated. Two programs run beside it: the platform, and the grader with its secret.
  hone up                                                 (in a second terminal)
  hone models add-smollm2
  hone graders add addition http://127.0.0.1:9000/grade   (prints the secret and the grader's id)
  GRADER_SECRET=whsec_... python -m examples.endpoint_grader --port 9000     (in a third terminal)
  python -m examples.demo.prompts train.jsonl held_out.jsonl

With curl:
  KEY=$(cat ~/.hone/api_key); API=http://127.0.0.1:8000/v1
  curl -H "Authorization: Bearer $KEY" -F purpose=fine-tune -F file=@train.jsonl $API/files
  curl -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" $API/fine_tuning/jobs -d '{job}'
  curl -H "Authorization: Bearer $KEY" $API/fine_tuning/jobs/ftjob-.../events

With the openai client:
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=open(os.path.expanduser("~/.hone/api_key")).read().strip())
  file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
  job = client.fine_tuning.jobs.create(model="{model}", training_file=file.id, method={method})
  client.fine_tuning.jobs.retrieve(job.id).status
"""


def score_lines(comparison: Comparison) -> list[str]:
    rise = f"{comparison.rise:+.3f}, 95 % interval {comparison.lower:+.3f} to {comparison.upper:+.3f}"
    return [
        f"held-out reward: {comparison.before:.3f} -> {comparison.after:.3f}",
        f"difference: {rise}, paired over {comparison.num_rows} held-out rows",
    ]


def example_lines(rows: list[Row], before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> list[str]:
    """Three prompts with the first completion of each before and after."""
    first, last = ({sample["prompt_index"]: sample["completion"] for sample in samples if sample["g"] == 0} for samples in (before, after))
    lines = []
    for index in range(NUM_SHOWN):
        lines += [text_of(rows[index]), f"    before: {printable(first[index])}", f"    after:  {printable(last[index])}"]
    return lines


def printable(text: str) -> str:
    """Model output as one line of plain text: it may hold anything, terminal control sequences included."""
    short = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return ascii(short)
