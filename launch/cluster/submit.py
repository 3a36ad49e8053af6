"""``recalign submit``: render one of ``launch/slurm/*.sbatch`` for a recipe, freeze what it runs, and hand it to SLURM.

Every submission leaves ``RUN/slurm/submission-N`` behind: the resolved recipe that the job reads, the script, the
commit, what was changed since as a patch for ``git apply``, and the packages. The job starts from these, so editing the
recipe afterwards changes nothing.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from align.config import MainJob
from launch.cluster.status import ENVIRONMENT, SUBMISSION, submissions
from launch.cluster.where import ONE_PROCESS, run_of, site_file, stages_of
from launch.commands import replacing
from llm.lmrec_job import LMRecJob, is_recformer
from llm.recformer.job import RecformerJob
from rec.job import RecJob
from rec.runtime import files
from rec.runtime.config import Section, apply_overrides, build, read_recipe, without
from rec.runtime.errors import RESUME_ANYWAY, UserError
from rec.runtime.runfolder import RESULT, RunFolder
from rec.runtime.stopping import STOP, is_asked_by_a_person

RECIPE, SCRIPT, PATCH = "recipe.yaml", "job.sbatch", "uncommitted.patch"
# Whatever the user's own settings say.
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/")
# A file that no commit has and that is larger is no source; it is named instead.
MAX_UNTRACKED_BYTES = 2**20
SOURCE = re.compile(r"^source launch/slurm/(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Wish:
    """What to submit, and on how many nodes.

    Attributes:
        recipe: the file.
        overrides: ``key=value``.
        nodes: of the whole job.
        generator_nodes: of these, for alignment; 0 on one node divides that node.
        heterogeneous: trainer and generators as two components of a heterogeneous job.
        options: further options of sbatch, e.g. ``--time=12:00:00``, for both components.
        generator_options: still further ones, of the generators' component alone.
        site: the file of site settings; None takes ``launch/slurm/site.sh`` here, or the one that came along.
    """

    recipe: Path
    overrides: list[str]
    nodes: int
    generator_nodes: int | None = None
    heterogeneous: bool = False
    options: tuple[str, ...] = ()
    generator_options: tuple[str, ...] = ()
    site: Path | None = None


def submit(wish: Wish, command: str, dry_run: bool = False, fresh: bool = False) -> tuple[str, str | None]:
    """Freeze and submit; the script, and the job's number, None of a dry run, which writes nothing.

    With ``fresh`` the run folder is deleted, once SLURM has taken the job.

    Raises:
        UserError: on a mistake in the recipe, on nodes that do not fit it, if a job of this run waits for another
            recipe, or if SLURM refuses or is not here.
    """
    job, kind = _resolved(wish)
    run = Path(job.run)
    # Items that read what was said of them last need one generator, which alone knows.
    alone = isinstance(job, MainJob) and job.align.others == "newest"
    _check_nodes(wish, kind, alone)
    if not fresh:
        _check_run(run, job)
    # Every default written out, because another version of this program may have others; but how many processes there
    # are is decided by the nodes.
    content = without(job.model_dump(mode="json"), job.placement)
    before = [] if fresh else [int(path.name.rpartition("-")[2]) for path in submissions(run)]
    folder = run / "slurm" / f"{SUBMISSION}-{1 + max(before, default=0)}"
    script = render(wish, kind, folder / RECIPE, run / "slurm", alone)
    if dry_run:
        return script, None
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a login node of the cluster, or look with --dry-run")
    _require_none_waits(run, None if fresh else content)
    with replacing(run) if fresh else contextlib.nullcontext():
        files.write_text(folder / RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        files.write_text(folder / SCRIPT, script)
        patch, left_out = uncommitted(Path(__file__).parent)
        files.write_bytes(folder / PATCH, patch)
        environment = {**describe_environment(command), "untracked_and_too_large": left_out}
        files.write_json(folder / ENVIRONMENT, {"job": None, **environment})
        number = _sbatch(folder / SCRIPT, site_file(wish.site), wish)
        files.write_json(folder / ENVIRONMENT, {"job": number, **environment})
    return script, number


def render(wish: Wish, kind: str, recipe: Path, out: Path, one_generator: bool = False) -> str:
    """The batch script of a job: the shipped one, its sourced files put in, its node counts and recipe filled in."""
    name = "align-het.sbatch" if wish.heterogeneous else f"{kind}.sbatch"
    text = resources.files("launch.slurm").joinpath(name).read_text(encoding="utf-8")
    generators = wish.generator_nodes or 0
    if wish.heterogeneous:
        sizes = iter((wish.nodes - generators, generators))
        text = re.sub(r"--nodes=\d+", lambda _: f"--nodes={next(sizes)}", text)
    else:
        text = re.sub(r"^#SBATCH --nodes=\d+$", f"#SBATCH --nodes={wish.nodes}", text, flags=re.MULTILINE)
    # Quoted, and without meaning a pattern: a folder's name may hold blanks and per cent signs.
    output = shlex.quote(f"--output={str(out).replace('%', '%%')}/batch-%j.out")
    text = re.sub(r"^#SBATCH --output=.*$", lambda _: f"#SBATCH {output}", text, flags=re.MULTILINE)
    more, generators_more = _lines(wish.options), _lines(wish.generator_options)
    if wish.heterogeneous:  # each component has options of its own
        text = text.replace("#SBATCH hetjob\n", f"{more}#SBATCH hetjob\n")
    # Every #SBATCH line must come before the first command.
    head, begin, body = text.partition("trap EARLY")
    settings = f"RECALIGN_PYTHON=${{RECALIGN_PYTHON:-{shlex.quote(sys.executable)}}}\n"
    if os.environ.get(RESUME_ANYWAY):
        settings += f"export {RESUME_ANYWAY}=1\n"
    if kind == "align" and not wish.heterogeneous:
        settings += f"GENERATOR_NODES={generators}\n"
    if one_generator:
        settings += "GENERATORS=1\n"

    def included(found: re.Match) -> str:
        given = site_file(wish.site).read_text(encoding="utf-8") if found[1] == "site.sh" else None
        return f"# --- {found[1]} ---\n" + (given or resources.files("launch.slurm").joinpath(found[1]).read_text())

    body = SOURCE.sub(included, begin + body).replace('begin "$@"', f'set -- {shlex.quote(str(recipe))}\nbegin "$@"')
    first, _, rest = body.partition("\n")
    return f"{head}{more}{generators_more}{first}\n{settings}{rest}"


def _lines(options: tuple[str, ...]) -> str:
    return "".join(f"#SBATCH {shlex.quote(option)}\n" for option in options)


def describe_environment(command: str) -> dict[str, Any]:
    """What a result depends on beside the recipe: commit, interpreter, packages, where it was submitted."""
    here = Path(__file__).parent
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {
        "command": command,
        "submitted_at_s": round(time.time(), 3),
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "commit": _git(here, "rev-parse", "HEAD").decode().strip() or None,
        "uncommitted_changes": bool(_git(here, "status", "--porcelain")),
        "python": sys.version.split()[0],
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }


def _check_run(run: Path, job: Section) -> None:
    if run.is_dir():
        RunFolder(run).check(job)
    if (run / RESULT).exists():
        raise UserError(f"{run} is finished: there is nothing to submit; take another run folder (run=...), or --fresh")
    if is_asked_by_a_person(run):
        raise UserError(f"{run / STOP} asks this run to stop: delete it, or the job would end at once")


def _require_none_waits(run: Path, content: dict[str, Any] | None) -> None:
    """Raise a UserError if a job of this run is in SLURM's queue, unless it has the recipe ``content`` too."""
    for folder in submissions(run):
        job = files.read_json(folder / ENVIRONMENT)["job"] if (folder / ENVIRONMENT).is_file() else None
        if job is None or read_recipe(folder / RECIPE) == content:
            continue
        if state := _state_of(job):
            raise UserError(
                f"job {job} of {run} is {state} with {'this' if content is None else 'another'} recipe: end it first"
                f" (scancel {job}), or take another run folder"
            )


def _state_of(job: str) -> str:
    """What SLURM says of a job that is in its queue; nothing of one that is over."""
    if shutil.which("squeue") is None:
        return ""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return said.strip().partition("\n")[0].lower()


def _resolved(wish: Wish) -> tuple[Section, str]:
    """The recipe with its overrides, checked, and which script runs it."""
    run = run_of(wish.recipe, wish.overrides).absolute()
    content = apply_overrides(read_recipe(wish.recipe), [*wish.overrides, f"run={json.dumps(str(run))}"])
    kind = "align" if "align" in content else "pretrain" if "llm" in content else "train"
    if kind == "pretrain":
        section: type[Section] = RecformerJob if is_recformer(content) else LMRecJob
    else:
        section = {"align": MainJob, "train": RecJob}[kind]
    content = without(content, section.placement)
    # One process divides every batch; whether the nodes' processes do is seen when there are any.
    job = build(section, apply_overrides(content, ONE_PROCESS if kind == "align" else ()))
    if isinstance(job, LMRecJob) and job.llm.train.zero_stage == 0 and wish.nodes > 1:
        raise UserError(f"llm.train.zero_stage=0 is one process, --nodes is {wish.nodes}: set it to 1, 2 or 3")
    if kind == "pretrain" and not stages_of(content)[1]:
        raise UserError("llm.recformer has neither a pretrain nor a finetune section: there is nothing to do")
    return job, kind


def _check_nodes(wish: Wish, kind: str, one_generator: bool) -> None:
    if kind != "align":
        if wish.generator_nodes or wish.heterogeneous or wish.generator_options:
            raise UserError(
                "--generator-nodes, --het and --sbatch-generators are for alignment,"
                f" {wish.recipe} has no section align"
            )
        return
    if one_generator and (wish.generator_nodes or 0) > 1:
        raise UserError(
            f"align.others=newest needs one generator, which alone knows what it said: --generator-nodes"
            f" {wish.generator_nodes} would be as many at least"
        )
    if wish.generator_options and not wish.heterogeneous:
        raise UserError("--sbatch-generators needs --het: nodes of one allocation are all alike")
    if wish.generator_nodes is None and wish.nodes > 1:
        raise UserError("how many of the nodes are to generate? --generator-nodes M; recalign plan says what fits")
    if (wish.generator_nodes or 0) >= wish.nodes:
        raise UserError(f"--generator-nodes {wish.generator_nodes} leaves none of {wish.nodes} nodes to train on")
    if not wish.generator_nodes and (wish.nodes > 1 or wish.heterogeneous):
        raise UserError(f"--generator-nodes 0 divides one node, not {wish.nodes}; a heterogeneous job has one at least")


def _sbatch(script: Path, site: Path, wish: Wish) -> str:
    """Submit; the job's number. In the environment that the site's file sets: sbatch reads SBATCH_* there.

    The wish's options are in the script, but there the site's settings would win over them.
    """
    options = [*wish.options]
    if wish.heterogeneous:
        options += [":", *wish.options, *wish.generator_options]
    # What the site's file says is none of sbatch's answer.
    line = f"source {shlex.quote(str(site))} >&2; exec sbatch --parsable {shlex.join([*options, str(script)])}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}; the script is {script}")
    return done.stdout.strip().partition(";")[0]


def uncommitted(folder: Path) -> tuple[bytes, list[str]]:
    """What was changed and added since the commit in the repository around ``folder``, and what is too large for that.

    Returns:
        A patch for ``git apply``, empty where there is no repository; names of files that it leaves out.
    """
    top = _git(folder, "rev-parse", "--show-toplevel").decode().strip()
    if not top:
        return b"", []
    root, patch, left_out = Path(top), _git(Path(top), *DIFF, "HEAD"), []
    for name in filter(None, _git(root, "ls-files", "--others", "--exclude-standard", "-z").decode().split("\0")):
        if (root / name).lstat().st_size > MAX_UNTRACKED_BYTES:
            left_out.append(name)
        else:
            patch += _git(root, *DIFF, "--no-index", "--", "/dev/null", name, differs=1)
    return patch, left_out


def _git(folder: Path, *arguments: str, differs: int = 0) -> bytes:
    """What git prints, byte for byte; nothing outside of any repository. ``differs``: an exit code that is no error."""
    if shutil.which("git") is None:
        return b""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode in (0, differs) else b""
