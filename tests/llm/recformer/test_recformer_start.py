"""How long the stages' processes were at work, from the lines that they left."""

from llm.recformer.start import worked_s


def line(event: str, pid: int, time_s: float) -> dict[str, object]:
    return {"event": event, "pid": pid, "time_s": time_s}


def test_attempts_count_from_their_start_to_their_last_line():
    events = [
        line("table", 1, 50.0),  # of a process that began before this was written
        line("stage_started", 1, 100.0), line("pt_step", 1, 105.0),  # killed
        line("restarted", 9, 200.0),  # the one that watches
        line("stage_started", 2, 210.0), line("pt_step", 2, 212.0), line("stage", 2, 230.0),
        line("stage_started", 1, 300.0), line("ft1_step", 1, 303.0),  # a number that is given out again
        line("stage_started", 3, 400.0),
    ]  # fmt: skip
    assert worked_s(events) == 5.0 + 20.0 + 3.0
    assert worked_s([]) == 0.0
