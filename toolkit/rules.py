"""Settings that fit their types but not each other, as far as this can be known without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from toolkit.explain import Problem, closest
from toolkit.layers import Plan
from toolkit.register import KINDS, components
from toolkit.weights import DOWNLOADS, absent, how_to_get, settings_of, tower_download

Config = Mapping[str, Any]
PARTS = ("encoder", "proj", "rwkv")
"""First components of parameter names: what `stages.*.train` and `freeze` may begin with."""


def check(cfg: Config, plan: Plan) -> list[Problem]:
    """Every pair of settings that cannot go together. cfg: the composed config as plain values."""
    found = [entry for rule in _RULES for entry in rule(cfg)]
    return [Problem(where(plan, key), key, what, matches, fix) for key, what, matches, fix in found]


def where(plan: Plan, key: str) -> str:
    """The place of the strongest layer that sets a dotted key, or chooses its component."""
    parts = tuple(key.split("."))
    for length in range(len(parts), 0, -1):
        values = list(plan.values(*parts[:length]))
        if values:
            return values[-1].place
    choice = plan.choices.get(parts[0])
    return choice.place if choice else plan.choices["recipe"].place


Found = Iterator[tuple[str, str, tuple[str, ...], str]]
"""key, what, matches, fix."""


def _heads(cfg: Config) -> Found:
    node, width = cfg["recurrence"], cfg["model"]["d_model"]
    size = node.get("head_size", 0)
    if size and width % size:
        good = max(n for n in range(1, size + 1) if width % n == 0)
        what = f"{size} does not divide model.d_model={width}"
        yield (
            "recurrence.head_size",
            what,
            (),
            f"recurrence.head_size={good}, or model.d_model={width // size * size or size}",
        )


def _grid(cfg: Config) -> Found:
    tokens, scan = cfg["projector"].get("tokens", -1), cfg["scan"]["name"]
    if scan == "2d" and tokens in (0, 1) and cfg["scan"].get("columns", True):
        what = f"{tokens} leaves no grid of image tokens, and scan=2d reads rows and columns"
        yield "projector.tokens", what, (), "projector.tokens=4 or more, or scan=bi"
    if tokens > 0 and int(tokens**0.5) ** 2 != tokens:
        side = round(tokens**0.5)
        yield "projector.tokens", f"{tokens} is not a square number", (), f"projector.tokens={side * side}"
    if tokens == 0 and cfg["encoder"].get("class_token") is False:
        fix = "encoder.class_token=true, or projector.tokens=1"
        yield "projector.tokens", "0 keeps only the class token, and encoder.class_token is false", (), fix


def _context(cfg: Config) -> Found:
    tokens, length = cfg["projector"].get("tokens", -1), cfg["model"]["ctx_len"]
    if tokens >= length:
        fix = f"model.ctx_len={2 * tokens}, or fewer projector.tokens"
        yield "model.ctx_len", f"{length} leaves no room for text after {tokens} image tokens", (), fix


def _stages(cfg: Config) -> Found:
    if not cfg["stages"]:
        yield (
            "stages",
            "a run needs at least one training stage",
            (),
            "set stages.tune.train and stages.tune.steps",
        )
    for name, stage in cfg["stages"].items():
        head = f"stages.{name}"
        yield from _prefixes(stage, head, cfg["model"]["n_layer"])
        if stage["prompt"] and stage["prompt"] not in components("prompt"):
            known = components("prompt")
            near = tuple(closest(stage["prompt"], known))
            fix = (
                f"{head}.prompt={near[0] if near else next(iter(known))}, or leave it empty for the recipe's"
            )
            yield (
                f"{head}.prompt",
                f"no prompt named {stage['prompt']!r}; known: {', '.join(sorted(known))}",
                near,
                fix,
            )
        if not stage["steps"] and not stage["epochs"]:
            yield f"{head}.steps", "steps and epochs are both 0", (), f"{head}.steps=1000 or {head}.epochs=1"
        if stage["lr_final"] > stage["lr"]:
            what = f"{stage['lr_final']:g} is above {head}.lr={stage['lr']:g}; the rate falls"
            yield f"{head}.lr_final", what, (), f"{head}.lr_final={stage['lr'] / 10:g}"
        if stage["steps"] and stage["warmup"] > stage["steps"]:
            what = f"{stage['warmup']} is more than {head}.steps={stage['steps']}"
            yield f"{head}.warmup", what, (), f"{head}.warmup={stage['steps'] // 10}"


def _prefixes(stage: Config, head: str, n_layer: int) -> Found:
    if not stage["train"]:
        yield f"{head}.train", "nothing learns in this stage", (), f"{head}.train=[proj,rwkv]"
    for key in ("train", "freeze"):
        for prefix in stage[key]:
            parts = prefix.split(".")
            if parts[0] not in PARTS:
                near = tuple(closest(prefix, [*PARTS, "rwkv.emb", "rwkv.blocks", "rwkv.head"]))
                what = f"{prefix!r} begins no parameter's name; the parts are {', '.join(PARTS)}"
                yield f"{head}.{key}", what, near, f"{head}.{key}=[{near[0] if near else 'proj,rwkv'}]"
            elif (
                parts[:2] == ["rwkv", "blocks"]
                and len(parts) > 2
                and parts[2] not in map(str, range(n_layer))
            ):
                what = f"{prefix!r} is none of the layers 0 to {n_layer - 1} (model.n_layer={n_layer})"
                yield f"{head}.{key}", what, (), f"{head}.{key}=[rwkv.blocks.{n_layer - 1}]"


def _batches(cfg: Config) -> Found:
    micro = cfg["hardware"]["micro_batch"]
    for name, stage in cfg["stages"].items():
        total = stage["global_batch"]
        if stage["tokens"]:
            yield from _budget(stage, f"stages.{name}", micro)
        elif micro and total % micro:
            good = max(n for n in range(1, micro + 1) if total % n == 0)
            what = f"{micro} does not divide stages.{name}.global_batch={total}"
            yield "hardware.micro_batch", what, (), f"hardware.micro_batch={good}"


def _lanes(cfg: Config) -> Found:
    hardware = cfg["hardware"]
    if hardware["lanes"] == 1:
        return
    if hardware["parallel"] == 1:
        what = f"{hardware['lanes']} rows of a process run side by side, and hardware.parallel=1 runs one"
        yield "hardware.lanes", what, (), "hardware.parallel=0, or hardware.lanes=1"
    if hardware["graph"] == "never":
        what = f"{hardware['lanes']} rows of a process overlap as CUDA graphs alone, and hardware.graph=never"
        yield "hardware.lanes", what, (), "hardware.graph=auto, or hardware.lanes=1"


def _budget(stage: Config, head: str, micro: int) -> Found:
    if micro:
        what = f"micro batches are what {head}.tokens={stage['tokens']} holds, not {micro} samples"
        yield "hardware.micro_batch", what, (), "hardware.micro_batch=0"
    if stage["bucket"]:
        what = f"{head}.tokens={stage['tokens']} puts samples of like length together already"
        yield f"{head}.bucket", what, (), f"{head}.bucket=0"


def _report(cfg: Config) -> Found:
    """Keys that a table is reported by, before its rows train for hours."""
    for setting in ("rows", "best"):
        given = str(cfg["report"][setting])
        for key in [] if given in ("", "recipe") else [part.strip() for part in given.split(",")]:
            value: Any = cfg
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is None or (isinstance(value, Mapping) and "name" not in value):
                near = tuple(closest(key, _keys(cfg)))
                fix = f"report.{setting}={near[0] if near else 'scan'}"
                yield f"report.{setting}", f"{key!r} is no key of a run", near, fix


def _keys(node: Config, above: str = "") -> Iterator[str]:
    """Dotted keys of components and of values."""
    for key, value in node.items():
        if not isinstance(value, Mapping) or "name" in value:
            yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


_OWNERS = {"lm": ("recurrence", "model."), "proj": ("projector", "model.d_model")}
"""Section with weights -> beginnings of the settings that these weights decide."""


def _weights(cfg: Config) -> Found:
    """Weights whose config.json says that they are of another size or form than the recipe's model."""
    for section, heads in _OWNERS.items():
        given = cfg.get(section, {}).get("weights", "")
        for key, value in settings_of(given).items() if given else ():
            kind, _, option = key.partition(".")
            asked = cfg[kind].get(option or "name")
            if key.startswith(heads) and asked not in (None, 0, value):
                yield (
                    key,
                    f"{asked} does not fit {section}.weights={given}, made for {value}",
                    (),
                    f"{key}={value}",
                )
    if cfg.get("lm", {}).get("weights") and cfg["model"]["vocab"] != "world":
        what = (
            f"{cfg['model']['vocab']} renumbers the tokens; lm.weights needs the world vocabulary's numbers"
        )
        yield "model.vocab", what, (), "model.vocab=world"


_RULES: tuple[Callable[[Config], Found], ...] = (
    _heads,
    _grid,
    _context,
    _stages,
    _batches,
    _lanes,
    _report,
    _weights,
)


def missing(cfg: Config, keys: list[str], plan: Plan) -> list[Problem]:
    """The required settings that nobody gave, as one problem each, with what to write."""
    problems = []
    for key in sorted(keys):
        kind = key.partition(".")[0]
        what = "required, and not given"
        if kind in KINDS:
            what += f" ({kind} {cfg[kind]['name']!r} needs it)"
        problems.append(_missing(key, what, plan))
    for reader, split in _splits(cfg):
        if cfg["data"].get(split) == "" and f"data.{split}" not in keys:
            problems.append(_missing(f"data.{split}", f"not given, but {reader}={split} reads it", plan))
    problems += absent_weights(cfg, plan)
    return problems


def absent_weights(cfg: Config, plan: Plan, *, empty: bool = True) -> list[Problem]:
    """Weights that the config names and that cannot be read, with what to download and how to convert it.

    empty: whether towers that need weights and name none are told as well; counting parameters needs none.
    """
    problems = []
    for section in _OWNERS:
        given = cfg.get(section, {}).get("weights", "")
        wrong = absent(given, key=f"{section}.weights", download=DOWNLOADS[section]) if given else ""
        problems += _told(f"{section}.weights", wrong, plan)
    for key, node in _towers("encoder", cfg["encoder"]):
        given = node.get("weights", "random")
        # An encoder that takes the name of a model and a path of weights has no weights of its own.
        if given == "random" or not (given or (empty and "model" in node)):
            continue
        what = tower_download(str(node["name"]), str(node.get("model")))
        wrong = absent(given, key=key, download=what) if given else ""
        problems += _told(key, wrong or ("" if given else f"{key}: is empty; {how_to_get(key, what)}"), plan)
    return problems


def _towers(path: str, node: Any) -> Iterator[tuple[str, Config]]:
    """(key of its weights, node) of an encoder, or of each member of a fused one."""
    members = node.get("members") if isinstance(node, Mapping) else None
    if members:
        for number, member in enumerate(members):
            yield from _towers(f"{path}.members[{number}]", member)
    elif isinstance(node, Mapping):
        yield f"{path}.weights", node


def _told(key: str, wrong: str, plan: Plan) -> list[Problem]:
    """A complaint `key: what; fix` as a problem; none for an empty one."""
    what, _, fix = wrong.removeprefix(f"{key}: ").partition("; ")
    return [Problem(where(plan, key), key, what, (), fix)] if wrong else []


def _missing(key: str, what: str, plan: Plan) -> Problem:
    kind = key.partition(".")[0]
    place = plan.choices[kind].place if kind in plan.choices else where(plan, key)
    fix = f"{key}={'PATH' if kind == 'data' else 'VALUE'} on the command line, or in a recipe"
    return Problem(place, key, what, (), fix)


def _splits(cfg: Config) -> Iterator[tuple[str, str]]:
    """Which setting reads which split of the data."""
    for name, stage in cfg["stages"].items():
        yield f"stages.{name}.split", stage["split"]
    yield "eval.split", cfg["eval"]["split"]
    if cfg["eval"]["choose"]:
        yield "eval.choose", cfg["eval"]["choose"]
