"""Chat templates are rendered under a clock that must be gone when the process ends."""

import signal
import subprocess
import sys

PROGRAM = """
import atexit, signal
atexit.register(lambda: print(signal.getitimer(signal.ITIMER_VIRTUAL)[0]))  # runs after what is registered later
from common.prompt_tokens import rendered

class Tokenizer:
    def apply_chat_template(self, messages, **options):
        print(signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0)
        return "text"

rendered(Tokenizer(), [])
"""


def test_no_timer_is_left_that_would_kill_the_process_while_python_ends():
    """Python puts signals back to their defaults before it has ended, and this one's default kills."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert ended.returncode not in (-signal.SIGVTALRM, 128 + signal.SIGVTALRM)
    assert (ended.stdout.split(), ended.stderr) == (["True", "0.0"], "")
