"""A finished run as files for serving: the user tower, the item table, and a check that they answer as the model does.

A folder holds ``tower.onnx`` or ``tower.pt2`` (histories [B, L] and lengths [B] to states [B, D]),
``items.safetensors`` (vectors [N, D], row i being item number i + 1), ``items.parquet`` (ids and texts in the same
order), and ``config.json``. A score is the inner product of a state and an item's vector. It appears only after the
files have been read back and compared with the model on real histories.
"""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rec import ann as ann_index
from rec.data.prepared import Prepared
from rec.items import save_vectors
from rec.job import FinishedRun
from rec.models import MODELS
from rec.models.base import Recommender, SequenceRecommender
from rec.models.lightgcn import LightGCN
from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.packages import quiet, require_packages

To = Literal["onnx", "torch"]
Tower = Callable[[Tensor, Tensor], Tensor]

FORMAT, VERSION, CONFIG = "recalign-export", 1, "config.json"
ITEMS, ITEM_TABLE, USERS, USER_TABLE = "items.safetensors", "items.parquet", "users.safetensors", "users.parquet"
INDEX = "items.faiss"
TOWER: dict[To, str] = {"onnx": "tower.onnx", "torch": "tower.pt2"}
ONNX_PACKAGES = {name: name for name in ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE, TOP, CHECKED_USERS, QUERIES = 1e-4, 10, (1, 2, 7, 64), 1000
PROTOBUF_LIMIT = 2**31
"""Bytes; an ONNX file cannot be larger, its weights then lie beside it."""


@dataclass(frozen=True)
class Parity:
    """How far the exported files are from the model.

    Attributes:
        histories: how many were compared.
        state: largest difference of any number in a state (of all states where those are larger than 1, relative).
        top: largest difference of score, rank by rank, between the model's ten best and the export's (likewise).
        same_lists: share of histories where both lists name the same items in the same order.
    """

    histories: int
    state: float
    top: float
    same_lists: float

    @property
    def holds(self) -> bool:
        """Whether both differences are within the tolerance."""
        return self.state <= TOLERANCE and self.top <= TOLERANCE  # NaN is not


class UserTower(nn.Module):
    """``model.last_states`` as a module; ``fixed`` fills histories up to max_length for models that need one length."""

    def __init__(self, model: SequenceRecommender, fixed: bool) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """States [B, D] of histories [B, L], right-padded with 0, of lengths [B]."""
        if self.fixed:
            items = F.pad(items, (0, self.model.config.max_length - items.shape[1]))
        return self.model.last_states(items, lengths)


def check_packages(to: To, ann: bool) -> None:
    """Raise a UserError with the command to install what is missing."""
    if to == "onnx":
        require_packages("export to onnx", ONNX_PACKAGES)
    if ann:
        ann_index.check_packages()


def export_run(run: FinishedRun, to: To, out: Path, ann: bool = False) -> dict[str, Any]:
    """Write the folder ``out``, replacing an earlier export there.

    Args:
        run: on the CPU.
        to: format of the tower.
        out: the folder; it appears when everything in it is written and checked.
        ann: also write a faiss index over the item vectors, and measure it.

    Returns:
        The content of ``config.json``.

    Raises:
        UserError: if the model has no user states, a package is missing, ``out`` holds something else or cannot be
            written, or the files do not answer as the model does.
    """
    check_packages(to, ann)
    require_exportable(run.model)
    out = out.resolve()
    _require_replaceable(out)
    temporary = files.beside(out)
    earlier = temporary.with_name(f"{temporary.name}-earlier")
    try:
        temporary.mkdir(parents=True)
        content = _write(run, to, temporary, ann)
        files.fsync_below(temporary)  # before the earlier one goes: then it is gone for two renames alone
        if out.exists():
            out.rename(earlier)
        files.publish_folder(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        if earlier.exists() and not out.exists():
            earlier.rename(out)
        for folder in (temporary, earlier):
            shutil.rmtree(folder, ignore_errors=True)
    return content


def require_exportable(model: Recommender) -> None:
    """Raise a UserError that says why if there is nothing to export."""
    if not isinstance(model, SequenceRecommender | LightGCN):
        able = ", ".join(name for name, kind in MODELS.items() if issubclass(kind, SequenceRecommender))
        raise UserError(
            f"{model.architecture} scores every candidate beside the history, it has no user state to export: answer"
            f" with 'recalign recommend', or train one of {able}"
        )


@torch.no_grad()
def _write(run: FinishedRun, to: To, folder: Path, ann: bool) -> dict[str, Any]:
    model, data = run.model.eval().requires_grad_(False), run.data
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": model.architecture}
    content |= {"data": data.meta["content_hash"], "dim": model.config.dim, "n_items": data.n_items}
    source = {"run": str(run.path), "model": model.architecture, "data": data.meta["content_hash"]}
    parquet.write_table(data.items, folder / ITEM_TABLE)
    item_ids = data.items["item_id"].to_pylist()
    if isinstance(model, LightGCN):
        users, items = model(model.layer_zero())
        save_vectors(folder / ITEMS, item_ids, items, source)
        _write_users(folder, users, data)
        content["users"] = {"vectors": USERS, "table": USER_TABLE}
        table, stored = _stored(folder)
        parity = check_table(model, data, stored, table)
        queries = stored[: min(QUERIES, len(stored))]
    else:
        save_vectors(folder / ITEMS, item_ids, model.items.table()[1:], source)
        with quiet():
            program, fixed = trace(model)
            save_tower(program, model.config.max_length, folder / TOWER[to])
            tower = load_tower(folder / TOWER[to])
        table, _ = _stored(folder)
        content |= {"max_length": model.config.max_length, "tower": _describe_tower(to, fixed)}
        parity = check_tower(model, data, tower, table)
        queries = _states(model, data, tower)
    content["items"] = {"vectors": ITEMS, "table": ITEM_TABLE, "row": "item number - 1"}
    content["parity"] = {**asdict(parity), "tolerance": TOLERANCE}
    _require_parity(model, parity)
    if ann:
        width, costs = ann_index.write_index(table, queries, folder / INDEX, TOP)
        content["index"] = {
            "file": INDEX,
            "kind": "faiss IndexHNSWFlat, inner product",
            "row": "item number - 1",
            "efSearch": width,
            "queries": len(queries),
            "threads": torch.get_num_threads(),
            "measured": [asdict(cost) for cost in costs],
        }
    modules = ["torch", *(ONNX_PACKAGES if to == "onnx" else ()), *(("faiss",) if ann else ())]
    # A module's own version: builds for GPUs come as distributions of other names.
    content["written_with"] = {name: importlib.import_module(name).__version__ for name in modules}
    files.write_json(folder / CONFIG, content)
    return content


def trace(model: SequenceRecommender) -> tuple[torch.export.ExportedProgram, bool]:
    """The tower as a program, and whether it fills every history up to max_length inside."""
    from torch._dynamo.exc import UserError as NotTraceable

    try:
        return _trace(UserTower(model, fixed=False)), False
    except NotTraceable:
        # Recurrent layers and convolutions are traced for one length only.
        return _trace(UserTower(model, fixed=True)), True


def save_tower(program: torch.export.ExportedProgram, longest: int, path: Path) -> None:
    """Write a traced tower that reads up to ``longest`` items as ``.pt2`` or ``.onnx``."""
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        external_data=size > PROTOBUF_LIMIT // 2,
        input_names=["items", "lengths"],
        output_names=["states"],
        dynamic_shapes=_dynamic(longest),
        verbose=False,
    )


def _trace(tower: UserTower) -> torch.export.ExportedProgram:
    longest = tower.model.config.max_length
    length = max(1, longest // 2 + 1) if longest > 2 else longest
    items = torch.ones(3, length, dtype=torch.long)
    arguments = (items, torch.tensor([length, 1, length]))
    return torch.export.export(tower, arguments, dynamic_shapes=_dynamic(longest), strict=True)


def _dynamic(longest: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Which sizes of histories [B, L] and lengths [B] may vary."""
    batch = torch.export.Dim("batch", min=1)
    length = {1: torch.export.Dim("length", min=1, max=longest)} if longest > 1 else {}
    return {0: batch, **length}, {0: batch}


def load_tower(path: Path) -> Tower:
    """The tower in ``path`` as a function of histories [B, L] and lengths [B], in the runtime that it is meant for."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()

    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def states(items: Tensor, lengths: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["states"], {"items": items.numpy(), "lengths": lengths.numpy()})[0])

    return states


@torch.no_grad()
def check_tower(model: SequenceRecommender, data: Prepared, tower: Tower, items: Tensor) -> Parity:
    """Compare a tower and item vectors [N, D] with the model, for batches and lengths of several sizes."""
    longest, found = model.config.max_length, []
    everyone = torch.randperm(data.n_users, generator=torch.Generator().manual_seed(0))
    for size in CHECKED_USERS:
        for length in sorted({1, min(2, longest), max(1, longest // 2), longest}):
            users = everyone[:size]
            histories, lengths = data.windows(users, data.offsets[1:][users], length)
            for padding in {0, longest - histories.shape[1]}:
                asked = F.pad(histories, (0, padding))
                want, got = model.last_states(asked, lengths), tower(asked, lengths)
                if want.shape != got.shape:
                    return Parity(len(users), float("inf"), float("inf"), 0.0)
                scores = model.score_all(users, asked, lengths)
                found.append((_difference(want, got), *_compare_lists(scores, got @ items.T), len(users)))
    return _worst(found)


@torch.no_grad()
def check_table(model: LightGCN, data: Prepared, users: Tensor, items: Tensor) -> Parity:
    """Compare user vectors [U, D] and item vectors [N, D] with the model."""
    wanted, found = model(model.layer_zero())[0], []
    everyone = torch.randperm(data.n_users, generator=torch.Generator().manual_seed(0))
    for size in CHECKED_USERS:
        some = everyone[:size]
        histories, lengths = data.windows(some, data.offsets[1:][some], model.config.max_length)
        scores = model.score_all(some, histories, lengths)
        state = _difference(wanted[some], users[some])
        found.append((state, *_compare_lists(scores, users[some] @ items.T), len(some)))
    return _worst(found)


def _compare_lists(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """Largest difference of score, rank by rank, of the best items in two matrices [B, N], and how many lists agree.

    An item's score is the wanted one in both lists: of items that are as good as equal either may come first.
    """
    k = min(TOP, wanted.shape[1])
    best, other = wanted.topk(k).indices, got.topk(k).indices
    by_rank = max(
        _difference(wanted.gather(1, best), wanted.gather(1, other)),
        _difference(wanted.gather(1, best), got.gather(1, best)),
    )
    return by_rank, float((best == other).all(1).float().mean())


def _difference(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


def _worst(found: list[tuple[float, float, float, int]]) -> Parity:
    histories = sum(row[3] for row in found)
    # max() would skip a NaN.
    state, top = (float(torch.tensor([row[i] for row in found]).max()) for i in range(2))
    return Parity(histories, state, top, sum(row[2] * row[3] for row in found) / histories)


def _require_parity(model: Recommender, parity: Parity) -> None:
    if not parity.holds:
        raise UserError(
            f"the exported {model.architecture} does not answer as the model does: states differ by {parity.state:.1e},"
            f" scores of the best {TOP} by {parity.top:.1e}, tolerance {TOLERANCE:.0e}; nothing was written"
        )


def _states(model: SequenceRecommender, data: Prepared, tower: Tower) -> Tensor:
    """[Q, D] states of test histories spread over the users; of whole histories where nothing is held out."""
    users, ends = data.instances("test")
    if not len(users):
        users, ends = torch.arange(data.n_users), data.offsets[1:]
    rows = torch.linspace(0, len(users) - 1, min(QUERIES, len(users))).long()
    items, lengths = data.windows(users[rows], ends[rows], model.config.max_length)
    kept = lengths > 0
    return tower(items[kept], lengths[kept])


def _write_users(folder: Path, vectors: Tensor, data: Prepared) -> None:
    save_vectors(folder / USERS, data.user_ids, vectors, {"data": data.meta["content_hash"]})
    parquet.write_table(pa.table({"user_id": data.user_ids}), folder / USER_TABLE)


def _stored(folder: Path) -> tuple[Tensor, Tensor | None]:
    """Item vectors [N, D] and, if there are any, user vectors [U, D], as the files have them."""
    users = load_file(folder / USERS)["vectors"] if (folder / USERS).is_file() else None
    return load_file(folder / ITEMS)["vectors"], users


def _describe_tower(to: To, fixed: bool) -> dict[str, Any]:
    return {
        "file": TOWER[to],
        "inputs": {
            "items": "int64 [batch, length], item numbers from 1, oldest first, right-padded with 0",
            "lengths": "int64 [batch], at least 1",
        },
        "output": {"states": "float32 [batch, dim]"},
        "fills_up_to_max_length": fixed,
    }


def _require_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = files.read_json(out / CONFIG).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{out} exists and is no earlier export; name another folder with --out")
    written = {CONFIG, ITEMS, ITEM_TABLE, USERS, USER_TABLE, INDEX, *TOWER.values(), f"{TOWER['onnx']}.data"}
    others = sorted(path.name for path in out.iterdir() if path.name not in written)
    if others:
        raise UserError(f"{out} holds more than an export ({others[0]}); name another folder with --out")
