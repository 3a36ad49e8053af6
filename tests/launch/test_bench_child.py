"""Measurements in processes of their own."""

import subprocess
import sys
import time

import pytest

from launch.bench.child import last_line
from rec.runtime.errors import UserError


def test_the_last_line_comes_back_and_mistakes_keep_their_words():
    assert last_line(["-c", "print('much'); print('42.5')"]) == "42.5"
    with pytest.raises(UserError, match=r"^data/x is no prepared folder$"):
        last_line(["-c", "import sys; sys.exit('error: data/x is no prepared folder')"])
    with pytest.raises(RuntimeError, match="failed: ZeroDivisionError"):
        last_line(["-c", "1 / 0"])
    with pytest.raises(RuntimeError, match=r"waited 0\.2 s for -c"):
        last_line(["-c", "import time; time.sleep(60)"], timeout_s=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_measurement_dies_with_its_benchmark(tmp_path):
    inner = f"import time\nwhile True: open({str(tmp_path / 'alive')!r}, 'a').write('x'); time.sleep(0.05)"
    outer = subprocess.Popen([sys.executable, "-c", f"from launch.bench.child import *; last_line(['-c', {inner!r}])"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "alive").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    outer.kill()
    outer.wait()
    time.sleep(0.5)
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.5)
    assert size == (tmp_path / "alive").stat().st_size
