"""How many inputs of its own a test makes: few in the suite, as many more as the environment asks for.

MORE_EXAMPLES=50 pytest tests/test_damage.py
"""

import os


def examples(few: int) -> int:
    """``few``, times MORE_EXAMPLES."""
    return few * int(os.environ.get("MORE_EXAMPLES", "1"))
