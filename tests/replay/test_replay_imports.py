"""A replay stays light: it shares its machine with the system under test."""

import subprocess
import sys


def test_no_tensors_no_store_no_cloud() -> None:
    heavy = ["torch", "transformers", "redis", "boto3", "fastapi", "uvicorn", "numpy"]
    program = f"import sys, spotserve.demo.run, spotserve.replay.run; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_timeline_is_pure() -> None:
    impure = ["asyncio", "httpx", "socket", "random"]
    program = f"import sys, spotserve.replay.timeline; print([n for n in {impure} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
