"""smoke.py SOURCE: a stranger's first steps with the installed wheel, in an environment with nothing else."""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import perqueue

source = Path(sys.argv[1])
home = Path(perqueue.__file__).resolve()
assert not home.is_relative_to(source), f"imported from the source folder: {home}"
assert home.is_relative_to(Path(sysconfig.get_path("purelib")).resolve()), f"imported from {home}"

heavy = {"httpx", "sqlite_utils"} & sys.modules.keys()
assert not heavy, f"`import perqueue` loads {sorted(heavy)}"
tools = {"aiohttp", "pytest", "rich"} & {path.name for path in home.parent.parent.iterdir()}
assert not tools, f"the environment is not clean: {sorted(tools)}"

assert version("useper-perqueue") == perqueue.__version__
command = Path(sysconfig.get_path("scripts")) / "perqueue"
for program in ([str(command)], [sys.executable, "-m", "perqueue"]):
    answer = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert perqueue.__version__ in answer.stdout, answer

with tempfile.TemporaryDirectory() as folder:
    queue = perqueue.PerQueue(
        Path(folder) / "activities.db",
        activity_token="smoke-test-token",
        activity_type_id="smoke-test-type",
        drain=False,
    )
    queue.record(billing_id="GROUP_A", user_id="USER_1")
    pending = queue.stats().pending
    assert pending == 1, f"recorded 1, pending {pending}"
    queue.close()

print(f"perqueue {perqueue.__version__}: imports light, answers --version, records without any extra")
