"""What the batch shell decides, in bash itself; of the scheduler's commands only what they would say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rec.runtime.runfolder import METRICS, RunFolder
from rec.runtime.stopping import STOP, is_asked_by_a_person

ROOT = Path(__file__).parents[2]
SETTINGS = """
cd {root}
RECALIGN_PYTHON={python}
source launch/slurm/site.sh
source launch/slurm/lib.sh
source launch/slurm/align.sh
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1 RESTART=${{RESTART:-0}} WARNED="" PATIENCE="" RUN={run} LOGS={run}/logs/job-7-0
mkdir -p "$LOGS" "$RUN/slurm"
scontrol() {{ [ "$1 $2" = "requeue 7" ] && exit 33; }}
"""
REQUEUED = 33


def bash(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess:
    text = SETTINGS.format(root=ROOT, python=sys.executable, run=folder) + program
    own = {**os.environ, "RECALIGN_GRACE_S": "1", **environment}
    return subprocess.run(["bash", "-c", text], env=own, capture_output=True, text=True, timeout=900, check=False)


def told(folder: Path) -> list[str]:
    return [row["event"] for row in RunFolder(folder).events()]


def test_an_exit_code_survives_a_trap_in_the_very_moment_and_a_process_that_is_quicker(tmp_path):
    program = """
    trap : USR1
    for delay in 0 0.5 0.52; do
      (sleep $delay; kill -USR1 $$; exit 7) & wait_for $!; echo $?
      (exit 5) & sleep 0.1; wait_for $!; echo $?
    done
    (kill -KILL $BASHPID) & wait_for $!; echo $?
    """
    assert bash(tmp_path, program).stdout.split() == ["7", "5"] * 3 + ["137"]


@pytest.mark.parametrize(
    "further",
    ["checkpoints/step-2", "finetune/FT1/checkpoints/step-4", "grid/lr-1/checkpoints/step-5", "llm/finished.json"],
)
def test_a_checkpoint_of_any_stage_is_further_and_logs_are_not(tmp_path, further):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    before = bash(run, "place").stdout
    for nothing in ("slurm/submission-2/environment.json", "logs/job-7-1/x.json", ".tmp-step-3/x.json"):
        (run / nothing).parent.mkdir(parents=True, exist_ok=True)
        (run / nothing).touch()
    assert bash(run, "place").stdout == before
    (run / further).parent.mkdir(parents=True, exist_ok=True)
    (run / further).touch()
    assert bash(run, "place").stdout != before


def test_a_persons_stop_ends_the_job_and_stays(tmp_path):
    (tmp_path / STOP).touch()
    done = bash(tmp_path, "warned; finish 0")
    assert (done.returncode, told(tmp_path)) == (0, ["warned", "stopped"])
    assert is_asked_by_a_person(tmp_path)


def test_a_warning_requeues_the_job_and_leaves_no_file_behind(tmp_path):
    done = bash(tmp_path, 'warned; cat "$RUN/STOP"; finish 0')
    assert done.returncode == REQUEUED, done.stderr
    assert "job 7: warned" in done.stdout
    assert told(tmp_path) == ["warned", "requeued"]
    assert not (tmp_path / STOP).exists()
    assert bash(tmp_path, "warned; finish 0", RESTART="100").returncode == 1
    assert told(tmp_path)[-1] == "failed"


def test_a_job_that_is_only_ever_warned_gives_up(tmp_path):
    codes = [bash(tmp_path, "warned; finish 1", RESTART=str(nth)).returncode for nth in range(4)]
    assert codes == [REQUEUED, REQUEUED, REQUEUED, 1]
    assert told(tmp_path)[-1] == "failed"
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert bash(tmp_path, "warned; finish 1").returncode == REQUEUED, "it has got further"
    assert bash(tmp_path, "warned; finish 1", RECALIGN_MAX_FUTILE="1").returncode == 1


def test_a_death_is_requeued_as_long_as_the_run_gets_further(tmp_path):
    for further, code in ((None, REQUEUED), (None, 9), ("a/checkpoints/step-1", REQUEUED), (None, 9)):
        if further:
            (tmp_path / further).mkdir(parents=True)
        assert bash(tmp_path, "finish 9").returncode == code
    assert told(tmp_path) == ["requeued", "failed"] * 2


def test_a_mistake_is_never_requeued_and_a_refused_requeue_is_a_failure(tmp_path):
    done = bash(tmp_path, 'echo "error: no such data" >"$LOGS/train-0.log"; finish 2')
    assert (done.returncode, told(tmp_path)) == (2, ["failed"])
    assert "error: no such data" in done.stdout
    assert bash(tmp_path / "other", "scontrol() { return 1; }; finish 9").returncode == 9
    assert told(tmp_path / "other") == ["requeued", "failed"]


def test_a_generator_that_cannot_go_on_ends_the_job_and_a_mistake_of_its_own_at_once(tmp_path):
    generators = 'GENERATOR_OPTIONS="" GENERATORS_ON=(n1) GENERATORS=1\n'
    dies = generators + "step() { return 1; }\ngenerate x & wait_for $!; [ $? = $GAVE_UP ] && cat $RUN/STOP"
    assert bash(tmp_path, dies).stdout.strip().endswith("job 7: the generator cannot go on")
    assert told(tmp_path) == ["restarted"] * 4
    wrong = dies.replace("return 1", 'echo "error: no such model" >$LOGS/generator-0.log; return 2')
    assert "cannot go on" in bash(tmp_path / "wrong", wrong).stdout
    assert not (tmp_path / "wrong" / METRICS).exists()


def test_a_job_on_a_run_that_another_one_holds_is_refused_with_its_owner(tmp_path):
    holds = "hold && echo held && read -r _"
    text = SETTINGS.format(root=ROOT, python=sys.executable, run=tmp_path) + holds
    with subprocess.Popen(["bash", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        # Waiting is for those whose predecessor is being killed.
        refused = bash(tmp_path, "flock() { command flock --nonblock 9; }; SLURM_JOB_ID=8; hold")
        owner = f"its job runs as process {first.pid} on {os.uname().nodename} in SLURM job 7"
        assert (refused.returncode, owner in refused.stdout) == (1, True), refused
        first.stdin.close()
    assert bash(tmp_path, "SLURM_JOB_ID=8; hold").returncode == 0


def test_lines_of_a_batch_shell_and_of_its_ranks_are_all_whole(tmp_path):
    done = bash(tmp_path, 'note attempt; note requeued "\\"why\\": \\"x\\""')
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(row["event"], row["job"], row.get("why")) for row in rows] == [
        ("attempt", "7", None),
        ("requeued", "7", "x"),
    ]


@pytest.mark.parametrize(
    ("gpus", "cores", "per_node", "generators", "expected"),
    [
        (8, 64, 8, 1, "7 OWN --cpus-per-task=56 --gpus-per-node=7 | OWN --cpus-per-task=8 --gpus-per-node=1"),
        (0, 8, 1, 1, "1 OWN --cpus-per-task=4 | OWN --cpus-per-task=4"),
        (0, 1, 1, 1, "1 --overlap | --overlap"),
        (1, 16, 1, 1, "1 --overlap | --overlap"),
        (2, 16, 2, 2, "error: 2 GPUs leave none to train on beside 2 generators"),
    ],
)
def test_one_node_is_divided_so_that_each_has_its_own(tmp_path, gpus, cores, per_node, generators, expected):
    program = f"""
    PER_NODE={per_node} GENERATORS={generators}; divide_node {gpus} {cores}
    echo "$PER_NODE $TRAINER_OPTIONS | $GENERATOR_OPTIONS"
    """
    assert bash(tmp_path, program).stdout.splitlines()[0] == expected.replace("OWN", "--exact --mem=0")


def test_each_process_has_a_thread_for_each_of_its_own_cores(tmp_path):
    program = "PER_NODE=2 GENERATORS=1; divide_node 0 {cores}; echo $OMP_NUM_THREADS"
    assert bash(tmp_path, f"export OMP_NUM_THREADS=24; {program.format(cores=24)}").stdout.split() == ["8"]
    given = f"export OMP_NUM_THREADS=3 THREADS_GIVEN=3; {program.format(cores=24)}"
    assert bash(tmp_path, given).stdout.split() == ["3"]


@pytest.mark.parametrize(("nodes", "of_them"), [("n1 n2 n3", -1), ("n1 n2", 0), ("n1", -1)])
def test_an_impossible_number_of_generator_nodes_ends_the_job(tmp_path, nodes, of_them):
    found = bash(
        tmp_path, f"HOSTS=({nodes}) GENERATOR_NODES={of_them} PER_NODE=1 SLURM_CPUS_ON_NODE=8; divide; echo on"
    )
    assert (found.returncode, found.stdout.startswith(f"error: GENERATOR_NODES={of_them} of")) == (2, True)
    assert told(tmp_path) == ["failed"]


@pytest.mark.parametrize(
    ("said", "hosts", "expected"),
    [
        ("10.0.0.5", "a b", "10.0.0.5"),
        ("", "a a", "has no address"),
        ("127.0.1.1", "a b", "where no other node finds it"),
        ("127.0.1.1", "a a", "127.0.1.1"),
    ],
)
def test_an_address_that_the_other_nodes_cannot_dial_is_refused_at_once(tmp_path, said, hosts, expected):
    program = f"""
    srun() {{ case "${{@: -1}}" in hostname) printf '%s\\n' {hosts};; *) echo {said};; esac; }}
    head_address n1 n2
    """
    found = bash(tmp_path, program)
    assert expected in found.stdout + found.stderr
    assert found.returncode == (0 if expected == said else 2)


def test_everything_that_python_runs_in_is_in_the_container():
    """Of the scripts' own text: on a bare host there may be no such Python."""
    inside = ("RECALIGN_PREFIX[@]", "step ", "exec ")  # a step has the prefix itself, and exec is in a step's own shell
    for path in sorted((ROOT / "launch" / "slurm").glob("*.s*")):
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if '"$RECALIGN_PYTHON" -m' in line:
                assert any(word in line for word in inside), f"{path.name}: {line}"
