"""``recalign submit``: render one of ``launch/slurm/*.sbatch`` for a recipe, freeze what it runs, and hand it to SLURM.

Every submission leaves ``RUN/slurm/submission-N`` behind: the resolved recipe that the job reads, the script, the
commit, what was changed since, and the packages. The job starts from these, so editing the recipe afterwards changes
nothing.
"""

import importlib.metadata
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
from launch.cluster.where import ONE_PROCESS, run_of, stages_of
from llm.lmrec_job import LMRecJob, is_recformer
from llm.recformer.job import RecformerJob
from rec.job import RecJob
from rec.runtime import files
from rec.runtime.config import Section, apply_overrides, build, read_recipe, without
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RESULT, RunFolder

SUBMISSION, RECIPE, SCRIPT, ENVIRONMENT, PATCH = (
    "submission", "recipe.yaml", "job.sbatch", "environment.json", "uncommitted.patch",
)  # fmt: skip
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
        options: further options of sbatch, e.g. ``--time=12:00:00``.
        site: the file of site settings; None takes ``launch/slurm/site.sh`` here, or the one that came along.
    """

    recipe: Path
    overrides: list[str]
    nodes: int
    generator_nodes: int | None = None
    heterogeneous: bool = False
    options: tuple[str, ...] = ()
    site: Path | None = None


def submit(wish: Wish, command: str, dry_run: bool = False) -> tuple[str, str | None]:
    """Freeze and submit; the script, and the job's number, None of a dry run, which writes nothing.

    Raises:
        UserError: on a mistake in the recipe, on nodes that do not fit it, or if SLURM refuses or is not here.
    """
    content, kind = _resolved(wish)
    run = Path(content["run"])
    _check_nodes(wish, kind)
    if (run / RESULT).exists():
        raise UserError(f"{run} is finished: there is nothing to submit; take another run folder (run=...)")
    number = len(list((run / "slurm").glob(f"{SUBMISSION}-*"))) + 1
    folder = run / "slurm" / f"{SUBMISSION}-{number}"
    # Items that read what was said of them last need one generator, which alone knows.
    alone = content.get("align", {}).get("others") == "newest" if kind == "align" else False
    script = render(wish, kind, folder / RECIPE, run / "slurm", alone)
    if dry_run:
        return script, None
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a login node of the cluster, or look with --dry-run")
    files.write_text(folder / RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    files.write_text(folder / SCRIPT, script)
    environment = describe_environment(command)
    files.write_text(folder / PATCH, _git("diff", "HEAD") or "")
    job = _sbatch(folder / SCRIPT, _site(wish.site))
    files.write_json(folder / ENVIRONMENT, {"job": job, **environment})
    return script, job


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
    text = re.sub(r"^#SBATCH --output=.*$", f"#SBATCH --output={out}/batch-%j.out", text, flags=re.MULTILINE)
    more = "".join(f"#SBATCH {option}\n" for option in wish.options)
    if wish.heterogeneous:  # each component has options of its own
        text = text.replace("#SBATCH hetjob\n", f"{more}#SBATCH hetjob\n")
    # Every #SBATCH line must come before the first command.
    head, begin, body = text.partition('cd "${SLURM_SUBMIT_DIR')
    settings = f"RECALIGN_PYTHON=${{RECALIGN_PYTHON:-{shlex.quote(sys.executable)}}}\n"
    if kind == "align" and not wish.heterogeneous:
        settings += f"GENERATOR_NODES={generators}\n"
    if one_generator:
        settings += "GENERATORS=1\n"

    def included(found: re.Match) -> str:
        given = _site(wish.site).read_text(encoding="utf-8") if found[1] == "site.sh" else None
        return f"# --- {found[1]} ---\n" + (given or resources.files("launch.slurm").joinpath(found[1]).read_text())

    body = SOURCE.sub(included, begin + body).replace('begin "$@"', f'set -- {shlex.quote(str(recipe))}\nbegin "$@"')
    first, _, rest = body.partition("\n")
    return f"{head}{more}{first}\n{settings}{rest}"


def describe_environment(command: str) -> dict[str, Any]:
    """What a result depends on beside the recipe: commit, interpreter, packages, where it was submitted."""
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {
        "command": command,
        "submitted_at_s": round(time.time(), 3),
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": sys.version.split()[0],
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }


def _resolved(wish: Wish) -> tuple[dict[str, Any], str]:
    """The recipe with its overrides, checked, and which script runs it."""
    run = run_of(wish.recipe, wish.overrides).absolute()
    content = apply_overrides(read_recipe(wish.recipe), [*wish.overrides, f"run={run}"])
    kind = "align" if "align" in content else "pretrain" if "llm" in content else "train"
    if kind == "pretrain":
        section: type[Section] = RecformerJob if is_recformer(content) else LMRecJob
    else:
        section = {"align": MainJob, "train": RecJob}[kind]
    # How many processes there are is decided by the nodes.
    content = without(content, section.placement)
    # One process divides every batch; whether the nodes' processes do is seen when there are any.
    job = build(section, apply_overrides(content, ONE_PROCESS if kind == "align" else ()))
    if kind == "pretrain" and not stages_of(content)[1]:
        raise UserError("llm.recformer has neither a pretrain nor a finetune section: there is nothing to do")
    if run.is_dir():
        RunFolder(run).check(job)
    return content, kind


def _check_nodes(wish: Wish, kind: str) -> None:
    if kind != "align":
        if wish.generator_nodes or wish.heterogeneous:
            raise UserError(f"--generator-nodes and --het are for alignment, {wish.recipe} has no section align")
        return
    if wish.generator_nodes is None and wish.nodes > 1:
        raise UserError("how many of the nodes are to generate? --generator-nodes M; recalign plan says what fits")
    if (wish.generator_nodes or 0) >= wish.nodes:
        raise UserError(f"--generator-nodes {wish.generator_nodes} leaves none of {wish.nodes} nodes to train on")
    if not wish.generator_nodes and (wish.nodes > 1 or wish.heterogeneous):
        raise UserError(f"--generator-nodes 0 divides one node, not {wish.nodes}; a heterogeneous job has one at least")


def _site(given: Path | None) -> Path:
    path = given or Path("launch/slurm/site.sh")
    if given is None and not path.is_file():
        return Path(str(resources.files("launch.slurm").joinpath("site.sh")))
    if not path.is_file():
        raise UserError(f"site settings not found: {path}")
    return path


def _sbatch(script: Path, site: Path) -> str:
    """Submit; the job's number. In the environment that the site's file sets: sbatch reads SBATCH_* there."""
    line = f"source {shlex.quote(str(site))}; exec sbatch --parsable {shlex.quote(str(script))}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}; the script is {script}")
    return done.stdout.strip().partition(";")[0]


def _git(*arguments: str) -> str | None:
    """What git says about the sources that are imported; None where they are in no repository."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
