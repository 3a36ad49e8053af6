"""What a command that refuses has to do."""


def assert_one_line(done: tuple[int, str, str], *parts: str) -> None:
    """The exit code of a user's mistake, nothing printed, and one line with all ``parts`` that says what to do."""
    code, out, err = done
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    printed = [line for line in out.splitlines() if "real_accelerator" not in line]  # by DeepSpeed, when it is imported
    assert (code, len(lines), printed) == (2, 1, []), err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]
