"""wheel_contents.py WHEEL: the wheel carries the package, its type marker and licence, and nothing else."""

import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())

kinds = {".css", ".html", ".js", ".py", ".typed"}
expected = {path.as_posix() for path in Path("perqueue").rglob("*") if path.suffix in kinds}
expected -= {"perqueue/_plugin/_perqueue_pytest.py"}
expected |= {"_perqueue_pytest.py"}  # found by pytest through its entry point
metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}

assert "perqueue/py.typed" in names, "the type marker is missing"
assert any(name.endswith("/licenses/LICENSE") for name in metadata), "the licence is missing"
assert not expected - names, f"left out of the wheel: {sorted(expected - names)}"
strangers = sorted(name for name in names - metadata - expected if not name.startswith("perqueue/"))
assert not strangers, f"not ours to install: {strangers}"
print(f"{wheel.name}: {len(names - metadata)} files, typed, licensed, no tests")
