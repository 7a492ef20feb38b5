from tests.trainer.conftest import _one_thread as _one_thread
from tests.trainer.conftest import tiny as tiny
