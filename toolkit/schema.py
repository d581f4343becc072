"""The typed schema of everything in a recipe that is not a component."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from toolkit.register import Choices, Range

Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]


@dataclass
class ModelConf:
    """Sizes of the language model."""

    d_model: Positive = 64  # width D
    n_layer: Positive = 2  # layers L
    ctx_len: Positive = 256  # longest sequence in tokens, image vectors included
    overlong: Annotated[str, Choices("refuse", "cut")] = "refuse"  # what happens to longer samples
    vocab: Annotated[str, Choices("dataset", "world")] = "dataset"  # ids of the data set only, or all 65,536


@dataclass
class PartConf:
    """Where a part of the model starts from."""

    weights: str = ""  # folder that `toolkit.convert` wrote, or a .safetensors file; empty: from scratch


@dataclass
class LossConf:
    """Loss of one step."""

    reduction: Annotated[str, Choices("sample", "batch")] = "sample"  # mean per sample, or per answer token
    l2: Annotated[str, Choices("none", "answers", "all")] = (
        "answers"  # where the L2 term on the largest logit acts
    )


@dataclass
class StageConf:
    """One training stage: what learns, for how long, how fast."""

    train: list[str] = field(default_factory=lambda: ["proj", "rwkv"])  # parameter-name prefixes that learn
    freeze: list[str] = field(default_factory=list)  # prefixes taken out of `train` again, e.g. rwkv.emb
    order: int = 0  # stages run by rising order; equal ones as named, the scale's before the recipe's
    split: str = "train"  # split of the data source
    mix: list[str] = field(default_factory=list)  # several splits in shares: [train:0.7,align:0.3]
    block: Positive = 1  # neighbours that stay together; 1: a full shuffle, 64 suits data behind a URL
    window: Positive = 8  # blocks that are shuffled into each other
    bucket: Count = 0  # steps whose samples are sorted by length together, to pad less; 0: not sorted
    tokens: Count = 0  # most samples x longest of a micro batch; global_batch is then a mean; 0: no limit
    prompt: str = ""  # registered prompt for this stage; empty: the recipe's
    steps: Count = 1000  # optimizer steps; 0 with epochs set
    epochs: Annotated[float, Range(0)] = 0.0  # passes over the split, if steps is 0
    global_batch: Positive = 64  # samples per optimizer step
    lr: Annotated[float, Range(0, open_low=True)] = 1e-3
    lr_final: Annotated[float, Range(0)] = 0.0
    warmup: Count = 0  # steps of linear warm-up
    weight_decay: Annotated[float, Range(0)] = 0.0  # on matrices only
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.99
    eps: Annotated[float, Range(0, open_low=True)] = 1e-8
    grad_clip: Annotated[float, Range(0)] = 1.0  # largest gradient norm; 0: no clipping


@dataclass
class FeatureConf:
    """Whether a frozen encoder's features are computed once per picture and kept."""

    cache: Annotated[str, Choices("auto", "memory", "disk", "off")] = "auto"
    limit_mb: Positive = 4096  # auto keeps features on disk up to this size, else computes them in each step
    draft: Count = 0  # JPEGs may be decoded smaller while both sides keep this many pixels; 0: whole


@dataclass
class EvalConf:
    """Evaluation by greedy generation and exact match."""

    split: str = "test"
    choose: str = ""  # split that `report.best` chooses by, scored at the end as well; empty: by `split`
    batch: Positive = 256
    max_new_tokens: Positive = 8
    limit: Count = 0  # examples to score, 0: all
    every: Count = 0  # steps between evaluations while training, 0: only at the end
    every_limit: Count = 0  # examples to score at those, 0: as at the end


@dataclass
class HardwareConf:
    """Where and how fast; no part of a run's identity."""

    device: Annotated[str, Choices("auto", "cpu", "cuda")] = "auto"
    precision: Annotated[str, Choices("fp32", "bf16")] = "fp32"
    backend: Annotated[str, Choices("auto", "triton", "torch", "reference")] = "auto"  # of the kernels
    micro_batch: Count = 0  # samples per forward pass, 0: the whole global_batch
    workers: Count = 0  # data loader processes
    threads: Annotated[int, Range(0, 1024)] = 0  # CPU threads of torch, 0: all cores
    parallel: Count = 1  # rows of a sweep that run side by side, 0: as many as the machine has room for
    lanes: Annotated[int, Range(1, 16)] = 1  # of those rows, how many share a process, each on a GPU stream
    graph: Annotated[str, Choices("auto", "always", "never")] = "auto"  # training steps as one CUDA graph
    meant_for: Annotated[str, Choices("any", "gpu")] = "any"  # what the scale's sizes suit; told if absent


@dataclass
class CheckpointConf:
    """When a run saves all that it needs to go on; it does so too when it is asked to stop."""

    minutes: Annotated[float, Range(0)] = 10.0  # training time between two; 0: not by the clock
    every: Count = 0  # steps between two; 0: not by steps
    keep: Positive = 2  # newest ones that are kept while the run trains


@dataclass
class LogConf:
    """What a run writes while it goes."""

    csv: bool = True
    tensorboard: bool = True
    every: Positive = 50  # steps between two rows


@dataclass
class PathsConf:
    """Where things lie; no part of a run's identity."""

    runs: str = "runs"
    cache: str = ""  # converted data and features; empty: TOOLKIT_CACHE, else ~/.cache/visualrwkv-toolkit


@dataclass
class ReportConf:
    """Plan of a table: which key its rows vary, and the paper's values beside ours."""

    rows: str = ""  # key, keys with commas between, or `recipe`
    caption: str = ""
    names: dict[str, str] = field(default_factory=dict)  # a varied value -> its name for people: {"-1": all}
    best: str = ""  # key of which each row keeps the value with the best mean accuracy, e.g. stages.tune.lr
    order: list[str] = field(default_factory=list)  # what to test: "2d > uni", "sandwich > prefix > suffix"
    published: dict[str, Any] = field(default_factory=dict)  # row -> {benchmark: value}


@dataclass
class RunConf:
    """One run. Component kinds are groups: choose with `scan=2d`, tune with `scan.columns=false`."""

    title: str = ""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # as far as NumPy counts
    faults: Annotated[str, Choices("strict", "tolerant")] = "strict"  # damaged samples stop, or are left out
    model: ModelConf = field(default_factory=ModelConf)
    lm: PartConf = field(default_factory=PartConf)
    proj: PartConf = field(default_factory=PartConf)
    loss: LossConf = field(default_factory=LossConf)
    stages: dict[str, StageConf] = field(default_factory=dict)
    features: FeatureConf = field(default_factory=FeatureConf)
    eval: EvalConf = field(default_factory=EvalConf)
    hardware: HardwareConf = field(default_factory=HardwareConf)
    checkpoint: CheckpointConf = field(default_factory=CheckpointConf)
    log: LogConf = field(default_factory=LogConf)
    paths: PathsConf = field(default_factory=PathsConf)
    report: ReportConf = field(default_factory=ReportConf)
    plugins: list[str] = field(default_factory=list)
    encoder: Any = None
    projector: Any = None
    scan: Any = None
    prompt: Any = None
    recurrence: Any = None
    data: Any = None


def store() -> None:
    """Puts the schema into Hydra's ConfigStore, where `conf/run.yaml` names it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=RunConf)
