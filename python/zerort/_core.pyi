"""The compiled core. Plans, the gradient cursor, CPU kernels and the trace ring; see the Rust crate
`zerort-core`.
"""

import builtins
from collections.abc import Sequence
from typing import Any, Literal, final

__version__: str

__all__ = [
    "Bucket",
    "BucketTimes",
    "Buffer",
    "Channel",
    "Exchange",
    "Finished",
    "Fragment",
    "Gatherer",
    "Hop",
    "Link",
    "List",
    "LossScale",
    "Machine",
    "Plan",
    "Prediction",
    "Reading",
    "Reducer",
    "Segment",
    "Trace",
    "TraceSnapshot",
    "Traffic",
    "Unit",
    "Workload",
    "__version__",
    "choose_buckets",
    "copy",
    "cut_units",
    "default_bucket_bytes",
    "dequantize",
    "first_nonfinite",
    "guess_bucket_bytes",
    "quantize",
    "reduce",
    "reshard",
    "simulate",
    "squared_norm",
    "sum_quantized",
    "take_writes",
]

_Dtype = Literal["f32", "f16", "bf16", "f64"]
_CommandKind = Literal["launch", "retire", "need", "gather", "free"]
_Pass = Literal["forward", "backward", "local_backward", "evaluation"]
_At = Literal["forward", "backward", "local_backward", "evaluation", "boundary", "need", "serve"]
_Op = Literal["reduce_scatter", "all_reduce", "all_gather", "copy"]
_Group = Literal["shard", "replica", "inner", "outer", "job", "own"]
_Algorithm = Literal["ring", "halving", "tree", "flat", "broadcasts", "best", "measured"]
_Grain = Literal["element", "whole"] | int
_Way = Literal["owned", "exchanged"]
_Bound = Literal["share", "least", "message", "most", "unit"]

@final
class Bucket:
    """Parameters reduced together in one flat buffer; all offsets and lengths are in elements."""

    @property
    def id(self) -> int: ...
    @property
    def dtype(self) -> _Dtype: ...
    @property
    def group(self) -> int | None:
        """Optimizer parameter group the bucket belongs to; None where it is only held: no optimizer
        has it, and nothing of it is reduced.
        """
    @property
    def wire(self) -> int:
        """How its gradients are encoded: the number of a wire format."""
    @property
    def unit(self) -> int | None:
        """The unit it belongs to; None where every rank keeps its parameters whole."""
    @property
    def sharded(self) -> bool:
        """Whether its parameters are sharded between their uses."""
    @property
    def grain(self) -> _Grain:
        """What of its parameters no border between shards cuts: a block of so many elements, or a
        whole parameter, see `way`.
        """
    @property
    def way(self) -> _Way | None:
        """How whole gradients reach their owners: its shards hold whole parameters, or cut them and
        ranks exchange the parts. None where the grain is not "whole".
        """
    @property
    def params(self) -> list[int]:
        """Parameter ids in the order in which they lie in the buffer."""
    @property
    def offsets(self) -> list[int]:
        """Start of each parameter of `params`; every one is on 64 bytes."""
    @property
    def numels(self) -> list[int]: ...
    @property
    def numel(self) -> int:
        """Padded length: a multiple of world x 128. Where shards hold whole parameters there is
        padding behind the last of each, and one may hold nothing else.
        """
    @property
    def shard_numel(self) -> int: ...
    @property
    def reduce_hops(self) -> list[Hop]:
        """From a rank's own gradient to what its optimizer needs."""
    @property
    def publish_hops(self) -> list[Hop]:
        """From a rank's updated shard to the parameters that it computes with."""
    @property
    def gather_hops(self) -> list[Hop]:
        """From shards to whole parameters, where they are sharded between their uses."""

@final
class Hop:
    """One collective of a bucket."""

    @property
    def op(self) -> _Op: ...
    @property
    def group(self) -> _Group:
        """Whom with."""
    @property
    def wire(self) -> int | None:
        """The number of the wire format; None is as it lies in memory."""

@final
class Fragment:
    """A parameter's part inside one rank's shard, in elements."""

    @property
    def param(self) -> int: ...
    @property
    def param_start(self) -> int: ...
    @property
    def shard_start(self) -> int: ...
    @property
    def length(self) -> int: ...

@final
class Plan:
    """The immutable result of planning. Every rank computes the same one; `digest` proves it.

    `params` is `(numel, dtype, optimizer group, wire format)` in registration order; the index is
    the parameter's id. One that no optimizer has is only held: its group is None. The cap of a
    bucket is given in bytes or in elements, never both. `window` is how many launched buckets may
    be unretired; None means all. `units` has an entry for each parameter, as `cut_units` gave it;
    at stage 3 a parameter without a unit is replicated.

    `grains` says for each parameter what of it a shard must not cut: nothing ("element"), blocks of
    so many elements from its start, or "whole"; `costs` what its update costs the rank that owns it
    where it is whole, in any measure; by default its length. Whole parameters are packed whole into
    the shards where their bucket is not longer for it by more than the share `whole_padding` of its
    length when it is cut evenly; else it is cut evenly, and the plan has `exchanges`. Grains mean
    nothing where the optimizer is not sharded, or does not have the parameter.

    `replicas` copies of the model state share the ranks, and `hosts` those of a copy. Here ranks
    are numbered by copy and shard, whatever the job calls them: rank 1 holds shard 1 of the first
    copy. Raises `PlanError`.
    """

    def __new__(
        cls,
        params: Sequence[tuple[int, _Dtype, int | None, int]],
        *,
        world: int,
        stage: int,
        cap_bytes: int | None = None,
        cap_elements: int | None = None,
        window: int | None = None,
        units: Sequence[int | None] | None = None,
        grains: Sequence[_Grain] | None = None,
        costs: Sequence[int] | None = None,
        whole_padding: float = 0.1,
        hosts: int = 1,
        replicas: int = 1,
    ) -> Plan: ...
    @staticmethod
    def restore(
        params: Sequence[tuple[int, _Dtype, int | None, int]],
        buckets: Sequence[tuple[Sequence[int], Sequence[int], int]],
        *,
        world: int,
        stage: int,
    ) -> Plan:
        """The plan whose layout was written down, by this planner or another.

        A bucket is `(parameter ids in buffer order, where each starts, padded length)`. Raises
        `PlanError` when the buckets do not tile the parameters, or the ranks a bucket.
        """
    @property
    def world(self) -> int: ...
    @property
    def shards(self) -> int:
        """Ranks that hold different shards of one model state."""
    @property
    def cap_bytes(self) -> int | None:
        """How long a bucket might become, in bytes; None where that was given in elements."""
    @property
    def cap_elements(self) -> int | None:
        """The same in elements; None where it was given in bytes."""
    @property
    def window(self) -> int: ...
    @property
    def num_params(self) -> int: ...
    @property
    def shards_optimizer(self) -> bool: ...
    @property
    def reduces_every_micro_batch(self) -> bool:
        """Whether gradients are reduced in every backward, and no rank keeps them whole."""
    @property
    def shards_gradient(self) -> bool: ...
    @property
    def shards_parameter(self) -> bool: ...
    @property
    def digest(self) -> int:
        """64-bit hash of layout, rules and schedule."""
    @property
    def buckets(self) -> list[Bucket]: ...
    @property
    def schedule(self) -> list[tuple[_CommandKind, int]]:
        """The static list: `("launch" | "retire", bucket id)`."""
    @property
    def program(self) -> list[int]:
        """`schedule` as codes of actions, see `Gatherer`."""
    @property
    def lists(self) -> list[List]:
        """The lists of passes whose routes are known; empty before `routed`."""
    def routed(self, routes: Sequence[Sequence[int]], *, room: int, depth: int) -> Plan:
        """The same layout and order of launches, with a list for each of `routes`, as
        `Gatherer.routes` gave them.

        `room` is how many elements may be whole or gathering at once, `depth` how many stops ahead
        units are gathered. `reordered` drops the lists. Raises `PlanError` for routes that are not
        this plan's.
        """
    @property
    def units(self) -> list[Unit]:
        """What is gathered and freed together, by id; empty unless parameters are sharded."""
    def fragments(self, bucket: int, rank: int) -> list[Fragment]: ...
    def owner(self, param: int) -> int | None:
        """The rank that steps a parameter; None where its grain is not "whole"."""
    @property
    def costs(self) -> list[int]:
        """What the updates of the parameters cost that each rank owns, by rank."""
    def exchanges(self, rank: int) -> list[Exchange]:
        """What `rank` sends and receives at the boundary where buckets are exchanged: an entry for
        each dtype, the same dtypes on all ranks.
        """
    def reordered(self, observed: Sequence[int]) -> Plan:
        """The same layout, launched in the order in which `observed` (parameter ids by arrival)
        fills the buckets.
        """

@final
class Exchange:
    """One rank's part in bringing reduced gradients of one dtype whole to their owners; parameters
    come back along the same rows the other way round.

    An owner keeps its parameters in a flat room. A row is a run of elements of one parameter:
    `(bucket, parameter, start in the holder's shard, start in the owner's room, length)`. What one
    rank sends to another is, row by row, what that receives from it. All figures are in elements.
    """

    @property
    def dtype(self) -> _Dtype:
        """Of the parameters."""
    @property
    def room(self) -> int:
        """Length of this rank's room; 0 where it owns nothing."""
    @property
    def places(self) -> list[tuple[int, int]]:
        """The parameters that it owns, and where each starts in its room: on 64 bytes."""
    @property
    def send_splits(self) -> list[int]:
        """How many elements of gradients go to each rank, and of parameters come from it."""
    @property
    def recv_splits(self) -> list[int]:
        """How many elements of gradients come from each rank, and of parameters go to it."""
    @property
    def send(self) -> list[tuple[int, int, int, int, int]]:
        """What it holds and another rank owns, by rank."""
    @property
    def recv(self) -> list[tuple[int, int, int, int, int]]:
        """What it owns and another rank holds, by rank."""
    @property
    def kept(self) -> list[tuple[int, int, int, int, int]]:
        """What it holds and owns: it only moves from shard to room."""

@final
class List:
    """The static list of one pass, in which units are needed, gathered and freed too."""

    @property
    def kind(self) -> _Pass: ...
    @property
    def key(self) -> int:
        """Which pass it is for."""
    @property
    def start(self) -> list[int]:
        """Units that it finds whole."""
    @property
    def end(self) -> list[int]:
        """Units that it leaves whole."""
    @property
    def commands(self) -> list[tuple[_CommandKind, int]]:
        """With the number of the bucket, the unit or the stop."""
    @property
    def stops(self) -> list[list[int]]:
        """The units that each stop needs."""

@final
class Unit:
    """Parameters that are gathered and freed together: whole buckets."""

    @property
    def id(self) -> int: ...
    @property
    def buckets(self) -> list[int]: ...
    @property
    def params(self) -> list[int]:
        """Of all its buckets, in their order."""
    @property
    def numel(self) -> int:
        """Padded length of its buckets together, which counts against the room."""

def cut_units(
    modules: Sequence[tuple[int, Sequence[int]]], numels: Sequence[int], *, cap: int
) -> list[int | None]:
    """The unit of each parameter: runs of subtrees in registration order, at most `cap` elements
    each.

    A module is `(index of its parent or -1, ids of the parameters registered in it itself)`, a
    parent before its children. A subtree that fits is not torn; one module's own parameters never
    are. A shared parameter belongs to the first module that has it. A parameter of less than 0
    elements stays whole on every rank: its unit is None. Raises `PlanError`.
    """

@final
class Finished:
    """What `Reducer.finish` hands out."""

    @property
    def hi(self) -> int:
        """End of the list: every command below it may run now."""
    @property
    def absent(self) -> list[int]:
        """Watched parameters whose gradient never came."""
    @property
    def late(self) -> list[int]:
        """Parameters whose gradient came after their bucket had left; it is in `.grad`."""

@final
class Reducer:
    """The cursor for gradients: how far along the schedule one may go now.

    Its methods raise `StepError` when called in the wrong phase or with an unknown parameter.
    """

    def __new__(cls, plan: Plan) -> Reducer: ...
    def set_active(self, active: Sequence[bool]) -> None:
        """Which parameters require grad; the others are not waited for. Only between passes."""
    def post_sentinels(self) -> None:
        """From now on one parameter stands for all of its bucket, where it is known which comes
        last.

        Only between passes; it takes effect when a pass has observed.
        """
    def dismiss_sentinels(self) -> None:
        """From now on every parameter that requires grad is watched. Only between passes."""
    @property
    def watched(self) -> list[int]:
        """The parameters that `grad_ready` must be told of, in the pass under way or the next one,
        by id.
        """
    def begin(self, *, list: int | None = None, observe: bool = False) -> None:
        """Starts a pass: along the plan's schedule, or along its list of this number, or, with
        `observe`, one that hands out nothing before its end and learns anew.

        Along a list `hi` counts the list's commands: hand it to `Gatherer.reached`.
        """
    def grad_ready(self, param: int) -> int | None:
        """One gradient has been accumulated. None, or `hi`: every command of the schedule below
        `hi` may run.

        Outside a pass nothing is handed out; after `arm` the answer is 0 once: begin a pass and
        tell again.
        """
    def grad_ready_at(self, param: int, now_ns: int) -> int | None:
        """`grad_ready`, with the time kept for the trace."""
    def finish(self) -> Finished:
        """Ends the pass and hands out the rest of the list."""
    def reorder(self, plan: Plan) -> None:
        """Takes a plan of the same layout with another launch order. Only between passes."""
    @property
    def in_pass(self) -> bool: ...
    @property
    def observing(self) -> bool:
        """Whether a pass is under way that hands out nothing before its end, and learns."""
    def arm(self) -> None:
        """The next gradient that arrives outside a pass is answered with 0."""
    def disarm(self) -> None: ...
    @property
    def observed(self) -> list[int]:
        """Parameters in the order in which their last gradient arrived in the first pass; empty
        before it.
        """
    def explain(self) -> tuple[int, _CommandKind, int, list[int]] | None:
        """The command the cursor stands at (index, kind, bucket) and what its bucket lacks; None
        outside a pass.
        """
    def life(self) -> list[tuple[int, int, int, int, int]]:
        """Per bucket of the last pass: (bucket, first gradient ns, full ns, last parameter);
        `grad_ready_at` only.
        """

@final
class Gatherer:
    """The cursor for parameters: which units are whole, and what is to be run so that those are
    which somebody needs.

    What is to be run is a list of actions, each `4 * id + verb`: verb 0 launches a bucket, 1
    retires one, 2 gathers a unit, 3 frees one. They run first in first out, over all passes, and a
    gather of a unit that is whole is started all the same, because peers pair with it. Methods
    raise `StepError` when called in the wrong phase or for an unknown unit or set.
    """

    WIDTH: int
    """How many integers a row is."""

    def __new__(cls, reducer: Reducer, *, rank: int, room: int) -> Gatherer:
        """For the reducer's plan; `room` is how many elements may be whole or gathering at once."""
    def set_of(self, units: Sequence[int]) -> int:
        """The number of the set of `units`, in any order; it means nothing to other ranks."""
    def load(self, plan: Plan) -> None:
        """Takes a plan of the same layout with other lists. Between passes, or while rolling."""
    def open(self, kind: _At, entry: int = 0, seq: int = 0) -> None:
        """Something is about to begin, a pass that calls module number `entry`, while torch's
        sequence number is `seq`: roll until `read` has come to a decision. Nothing is sent yet.
        """
    def row(self, own: Sequence[int] = ()) -> list[int]:
        """This rank's row; at most 6 integers are the caller's own, carried and never read."""
    def read(self, rows: Sequence[int], apart: Sequence[bool] = ()) -> Reading:
        """What the rows of all ranks, one behind the other, mean here; `apart` says by rank which
        are of another engine's call.
        """
    @staticmethod
    def asked(rows: Sequence[int]) -> list[int]:
        """The units that rows ask for, in their order, each once."""
    def leave(self) -> list[int]:
        """Ranks ask for units while this one is in another engine's call: a pass along a list
        leaves that. Returns what is to be run.
        """
    def begin(self) -> list[int]:
        """What `read` has found together, or alone, begins. Returns what is to be run first."""
    def serve(self, units: Sequence[int]) -> list[int]:
        """Ranks have asked for `units`: what is to be run, and waited for before `served`."""
    def served(self) -> list[int]:
        """They have come: puts units back as they were."""
    def need(self, set: int, node: int = -1) -> tuple[list[int], int | None] | None:
        """The units of a set are about to be read; in a backward by the node with torch's sequence
        number `node`.

        None: they are whole, go on. Else what is to be run, and the unit to be asked for in a roll
        before the need is repeated; without one, wait for the gathers of the set and say `arrived`.
        """
    def is_current(self, set: int) -> bool:
        """Whether the units of a set are whole and nothing else has been needed since: a need of
        them has nothing to do.
        """
    def arrived(self, set: int) -> None:
        """The gathers of its units have been waited for: it is the current set."""
    def acquire(self, set: int, seq: int = -1) -> bool:
        """A use begins, at torch's sequence number `seq` where it enters a graph: until `release`
        its units are held. False, and nothing, where the set is not current: `need` it first.
        """
    def reuse(self, set: int) -> bool:
        """`acquire` without a sequence number, where a forward uses its current set once more and
        the first use of its units is known: a later one tells nothing. False, and nothing, anywhere
        else: `acquire` it.
        """
    def release(self, set: int) -> None:
        """That use is over."""
    def reached(self, hi: int) -> list[int]:
        """`Reducer.grad_ready` has answered `hi` in a backward along a list: what is to be run."""
    def close(self, *, complete: bool = True) -> list[int]:
        """The pass is over: the rest of its list, and what is freed. In a backward behind
        `Reducer.finish`. `complete` unless it broke off, so that nothing can be learnt from it.
        """
    def abandon(self) -> list[int]:
        """The window is lost, on all ranks alike: frees all, forgets what was counted."""
    def fail(self) -> None:
        """From now on this rank's rows say that its step is lost, until the boundary."""
    @property
    def listed(self) -> bool:
        """Whether the pass under way follows a list."""
    @property
    def in_pass(self) -> bool: ...
    @property
    def asking(self) -> int | None:
        """The unit that is to be asked for in a roll."""
    @property
    def went_off(self) -> bool:
        """Whether the pass under way has needed what its list has not."""
    def explain(self) -> tuple[int, _CommandKind, int] | None:
        """The command of the list that is next, with its place and number; None without a list, and
        behind it.
        """
    def holds(self, unit: int) -> bool:
        """Whether a unit may still be read: a use of it is open, or this backward has needed it."""
    def state(self, unit: int) -> Literal["sharded", "gathering", "whole"]: ...
    @property
    def in_use(self) -> bool:
        """Whether some use has begun and not ended."""
    @property
    def live(self) -> int:
        """Elements that are whole or gathering now."""
    @property
    def news(self) -> bool:
        """Whether this rank has seen routes that have not been broadcast; rank 0's are."""
    def routes(self) -> list[list[int]]:
        """All routes that are known, for `Plan.routed`."""
    def told(self) -> None:
        """They have been broadcast."""
    def strays(self) -> list[tuple[_Pass, int]]:
        """Passes, and the modules that they call, that stay free on this rank: three times in a row
        they have needed what their list had not.
        """

@final
class Reading:
    """What the rows of all ranks mean for this one."""

    @property
    def what(self) -> Literal["together", "alone", "serve", "again", "diverged"]: ...
    @property
    def kind(self) -> _At | Literal[""]:
        """Together: what all are at, "serve" where all serve. Diverged: what `rank` is at."""
    @property
    def list(self) -> int | None:
        """The list that the pass follows; None where it is free."""
    @property
    def news(self) -> bool:
        """Rank 0 has routes to broadcast."""
    @property
    def units(self) -> builtins.list[int]:
        """Serve: to be gathered by every rank in this order."""
    @property
    def rank(self) -> int:
        """Diverged: the first rank that is elsewhere."""
    @property
    def failed(self) -> builtins.list[int]:
        """Ranks whose step is lost."""
    @property
    def rows(self) -> builtins.list[tuple[_At, int, builtins.list[int]]]:
        """By rank: what it is at, its forwards and backwards since the boundary, what is its
        caller's own.
        """

@final
class Buffer:
    """A flat, contiguous, one-dimensional piece of a tensor's memory, taken over by DLPack without
    a copy.

    `source` is anything with `__dlpack__` (fp32, fp16, bf16, fp64, uint8; CPU or CUDA). With `plan`
    and `bucket` the buffer knows its partition and hands out shards and fragments. Raises
    `LayoutError`, which says why.
    """

    def __new__(
        cls, source: Any, plan: Plan | None = None, bucket: int | None = None
    ) -> Buffer: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def dtype(self) -> Literal["f32", "f16", "bf16", "f64", "u8"]: ...
    @property
    def device(self) -> tuple[int, int]:
        """DLPack's (device type, device id)."""
    def slice(self, start: int, length: int) -> Buffer: ...
    def shard(self, rank: int) -> Buffer: ...
    def fragment(self, param: int) -> Buffer:
        """The whole of one parameter in a bucket's buffer."""
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def reduce(
    chunks: Buffer,
    accum: Buffer,
    *,
    world: int,
    scale: float,
    add: bool,
    stride: int | None = None,
) -> float:
    """Sums `world` equal chunks in rank order, in fp32 (fp64 for fp64 chunks), times `scale`, into
    or onto `accum`. Each begins `stride` elements behind the one before, by default where that
    ends.

    `chunks` is (world x n,), or ((world - 1) x stride + n,), of fp32, bf16, fp16 or fp64; `accum`
    is (n,) of fp32, or fp64 for fp64 chunks. CPU only. Returns the squared norm of `accum`
    afterwards, accumulated in fp64: not finite exactly when an element is not.
    """

@final
class Segment:
    """A file without a name that the ranks of one host map: `memory` bytes for each rank, in whole
    pages, and the counters of `channels`. Raises `LayoutError` where the file has another length.
    """

    def __new__(
        cls, file: int, *, rank: int, world: int, channels: int, memory: int
    ) -> Segment: ...
    @staticmethod
    def length(*, world: int, channels: int, memory: int) -> int:
        """How long the file of a segment is, in bytes."""
    def start(self, rank: int) -> int:
        """Where in the file a rank's memory begins."""
    def buffer(self, rank: int, start: int, length: int) -> Buffer:
        """Bytes of a rank's memory, as uint8."""
    def across(self, start: int, length: int) -> Buffer:
        """From where such bytes begin in the first rank's memory to where they end in the last
        one's, as uint8.
        """
    def channel(self, number: int) -> Channel:
        """What a lane's collectives are counted by."""
    def leave(self) -> None:
        """This rank takes part in nothing any more: who waits for it hears so."""
    def left(self, rank: int) -> bool:
        """Whether a rank has left."""

@final
class Channel:
    """Memory of one lane that is used in turn: each use is posted by all ranks and read by all, and
    number n lies in piece n modulo 2.
    """

    @property
    def next(self) -> int:
        """The number of the next use; it stays that until the use is posted."""
    def post(self, number: int, *, lost: bool = False) -> None:
        """What this rank wrote for a use is there; a second call does nothing. With `lost` nobody
        needs it, and this rank reads nothing of that use.

        Raises `StepError` where a peer still reads the memory that was written.
        """
    def missing(self, number: int) -> int | None:
        """The first rank that has not posted a use."""
    def wait(self, number: int, seconds: float) -> int | None:
        """`missing`, once it is None, a rank that is missing has left, or `seconds` are over.
        Without the interpreter's lock.
        """
    def finish(self, number: int) -> None:
        """This rank has read what it needs of a use."""

def squared_norm(values: Buffer) -> float:
    """The squared norm of a CPU buffer, accumulated in fp64; not finite exactly when an element is
    not.
    """

def first_nonfinite(values: Buffer) -> int | None:
    """Index of the first infinity or NaN of a CPU buffer."""

def copy(source: Buffer, target: Buffer, *, threads: int = 1) -> None:
    """Copies `source` (n,) into `target` (n,), both of uint8, past the processor's caches where
    there is a MiB of it, on at most so many threads. CPU only.
    """

def take_writes(values: Buffer, master: Buffer) -> int:
    """Takes what was written into `values` (n,), of bf16 or fp16, since they were cast from
    `master` (n,), of fp32, over into `master`; returns the number of elements.

    An element counts as written when its bits are not those of its master's cast. CPU only.
    """

def quantize(
    values: Buffer,
    pieces: Buffer,
    *,
    world: int,
    scale: float,
    seed: int | None = None,
    before: Buffer | None = None,
    after: Buffer | None = None,
) -> None:
    """Writes `values` (world x n,) of fp32, times `scale`, into as many `pieces` of uint8: a byte
    for each element, then an fp32 scale for each 256.

    To the nearest, or randomly by a `seed` of 64 bits. With `after`, a residual (world x (2n bytes
    and 4 for each 256),) of uint8, what is left out is written there, once what was left out
    `before` has been added: by default what is in `after`. A group of 256 with an infinity or NaN
    arrives as such, and leaves no residual. CPU only.
    """

def sum_quantized(
    pieces: Buffer,
    accum: Buffer,
    *,
    world: int,
    scale: float,
    add: bool,
    stride: int | None = None,
) -> float:
    """Sums the `world` pieces of one shard in rank order, in fp32, times `scale`, into or onto
    `accum` (n,) of fp32. Each begins `stride` bytes behind the one before, by default where that
    ends. Returns what `reduce` returns. CPU only.
    """

def dequantize(pieces: Buffer, values: Buffer, *, world: int) -> None:
    """Reads `world` pieces into `values` (world x n,) of fp32. CPU only."""

def reshard(
    source: Plan, target: Plan, *, bucket: int, rank: int, came_from: Sequence[int]
) -> list[tuple[int, int, int, int, int]]:
    """What fills `rank`'s shard of `bucket` in `target`.

    Rows of (start in that shard, source rank, source bucket, start in the source's shard, length).

    `came_from` has, for each parameter of the bucket in its order, the id in `source`, or -1 where
    the source has none. Padding is not listed. Raises `PlanError` when the two disagree about a
    parameter's length.
    """

@final
class LossScale:
    """The dynamic loss scale, by DeepSpeed's rules or by Apex's, as a pure state machine.

    Apex's `forgives_at_minimum`, and `counts_through` the boundary at which the scale grows.
    """

    def __new__(
        cls,
        *,
        initial: float,
        window: int,
        hysteresis: int,
        consecutive: bool,
        minimum: float,
        forgives_at_minimum: bool = False,
        maximum: float = ...,
        counts_through: bool = False,
        factor: float = 2.0,
    ) -> LossScale: ...
    @property
    def scale(self) -> float: ...
    def update(self, overflow: bool) -> bool:
        """Advances by one boundary. False when the step overflowed with the scale already at its
        minimum, and the policy does not forgive that.
        """
    def state(self) -> tuple[float, int, int, int]:
        """(scale, hysteresis left, boundaries seen, boundary of the last overflow)."""
    def restore(self, state: tuple[float, int, int, int]) -> None: ...

@final
class Trace:
    """A ring of events and its writer in Chrome's trace format. Times are ns, passed in."""

    def __new__(cls, rank: int, capacity: int) -> Trace: ...
    def state(self, name: str, value: str | int | float) -> None:
        """Something that is true of the whole run; given again, a name has its new value."""
    def track(self, name: str) -> int:
        """A named row (a thread in Chrome's terms); the same name gives the same id."""
    def span(
        self,
        track: int,
        name: str,
        start_ns: int,
        end_ns: int,
        args: dict[str, str | int | float] | None = None,
    ) -> None: ...
    def instant(
        self, track: int, name: str, at_ns: int, args: dict[str, str | int | float] | None = None
    ) -> None: ...
    def counter(self, name: str, at_ns: int, value: float) -> None: ...
    def async_span(
        self,
        track: int,
        name: str,
        key: int,
        start_ns: int,
        end_ns: int,
        args: dict[str, str | int | float] | None = None,
    ) -> None:
        """A span that may overlap others of its track: one bucket's life."""
    @property
    def dropped(self) -> int:
        """Events that the ring has overwritten."""
    def __len__(self) -> int: ...
    def write(self, path: str) -> None:
        """Writes the whole ring as Chrome trace JSON, by a temporary file and a rename. Raises
        `OSError`.
        """
    def snapshot(self) -> TraceSnapshot:
        """What has been recorded by now, to be written while more is."""

@final
class TraceSnapshot:
    """A trace as it was at one moment."""

    def write(self, path: str) -> None:
        """As `Trace.write`, without the GIL."""

@final
class Link:
    """What a kind of collective costs: ns of one message, ns of a byte through a rank's link, and
    how it is made.

    `measured`: both are those of a whole collective, of `alpha_ns + byte_ns * bytes of the whole`
    with the ranks that they were measured with. `message_ns` is what every further message of
    `flat` adds where all are sent at once. Raises `PlanError` for a price below 0, an infinity, an
    algorithm that does not exist.
    """

    def __new__(
        cls,
        alpha_ns: float,
        byte_ns: float,
        algorithm: _Algorithm = "best",
        message_ns: float | None = None,
    ) -> Link: ...
    def duration_ns(
        self,
        op: Literal["reduce_scatter", "all_gather", "all_reduce"],
        ranks: int,
        nbytes: int,
    ) -> int:
        """ns of one collective over `nbytes`, those of the whole, among `ranks`."""

@final
class Machine:
    """What a step runs on.

    `scatter` reduces and `gather` gathers, between hosts; `inner` and `inner_gather` within one,
    where there are several `hosts` (0 or 1: all ranks on the outer links); `control` has the
    vote. `lanes`: collectives under way at once. `blocks`: waiting blocks the host, as on a CPU.
    `sums_pieces`: what arrives is every rank's piece and is summed here. `launch_ns`, `sum_ns` and
    `update_ns` are a bucket's, however small, beside those of a byte or an element: to start it, to
    take what one of its reduce hops has brought, to update it and start its publication. `overlap`:
    (ns, share of a step) that waiting for updated parameters has to cost for the next forward to
    wait for them instead; None is never. `wires`: bytes of an element by the number of its wire
    format. `room`: elements that may be whole at stage 3, and `depth`, stops ahead that they are
    gathered, where the plan has no lists.
    """

    def __new__(
        cls,
        scatter: Link,
        gather: Link | None = None,
        *,
        lanes: int = 1,
        inner: Link | None = None,
        inner_gather: Link | None = None,
        inner_lanes: int = 1,
        hosts: int = 0,
        control: Link | None = None,
        launch_ns: float = 0.0,
        pack_byte_ns: float = 0.0,
        sum_byte_ns: float = 0.0,
        update_element_ns: float = 0.0,
        update_ns: float = 0.0,
        sum_ns: float = 0.0,
        vote_ns: float = 0.0,
        blocks: bool = False,
        sums_pieces: bool = False,
        overlap: tuple[float, float] | None = None,
        wires: Sequence[float] = ...,
        room: int = ...,
        depth: int = 1,
    ) -> Machine: ...

@final
class Workload:
    """What a rank computes in a step: ns of one micro-batch's forward and backward, and when in the
    backward the gradient of each parameter comes, by id.
    """

    def __new__(
        cls,
        forward_ns: int,
        backward_ns: int,
        arrivals: Sequence[int],
        *,
        micro_batches: int = 1,
        other_ns: int = 0,
    ) -> Workload: ...
    @property
    def observed(self) -> list[int]:
        """Parameters in the order in which their gradients come, for `Plan.reordered`."""

@final
class Traffic:
    """One kind of collective over a step."""

    @property
    def sent_bytes(self) -> int:
        """That this rank sends."""
    @property
    def wire_ns(self) -> int:
        """On the wire, each by itself."""
    @property
    def flight_ns(self) -> int:
        """Between start and end, added up; what waits its turn counts."""
    @property
    def exposed_ns(self) -> int:
        """That a rank stood still for."""
    @property
    def hidden_ns(self) -> int:
        """The rest of `flight_ns`."""

@final
class BucketTimes:
    """A bucket in a predicted step; moments are ns behind the step's start, in its last pass."""

    @property
    def bucket(self) -> int: ...
    @property
    def full_ns(self) -> int: ...
    @property
    def launched_ns(self) -> int: ...
    @property
    def landed_ns(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Of its gradient as encoded."""
    @property
    def reduce(self) -> Traffic: ...

@final
class Prediction:
    """The step of one rank.

    `total_ns` is `forward_ns`, `backward_ns` (computing), `pack_ns`, `sum_ns`, `exposed_ns`
    (standing still for gradients), `gather_ns` (for parameters at stage 3), `vote_ns`, `update_ns`,
    `publish_ns` (for updated parameters, within the step or, where `overlapped`, in the next
    forward) and `other_ns` together.
    """

    @property
    def total_ns(self) -> int: ...
    @property
    def forward_ns(self) -> int: ...
    @property
    def backward_ns(self) -> int: ...
    @property
    def pack_ns(self) -> int: ...
    @property
    def sum_ns(self) -> int: ...
    @property
    def exposed_ns(self) -> int: ...
    @property
    def gather_ns(self) -> int: ...
    @property
    def vote_ns(self) -> int: ...
    @property
    def update_ns(self) -> int: ...
    @property
    def publish_ns(self) -> int: ...
    @property
    def other_ns(self) -> int: ...
    @property
    def overlapped(self) -> bool: ...
    @property
    def communication_ns(self) -> int:
        """What communication adds: all standing still, and the vote."""
    @property
    def sent_bytes(self) -> int: ...
    @property
    def peak_in_flight(self) -> int:
        """Most bytes of gradients that were under way at once."""
    @property
    def peak_whole(self) -> int:
        """Most elements that were whole or gathering at once, of those that are sharded."""
    @property
    def reduce(self) -> Traffic: ...
    @property
    def gather(self) -> Traffic: ...
    @property
    def publish(self) -> Traffic: ...
    @property
    def buckets(self) -> list[BucketTimes]:
        """In the order in which they were launched."""

def simulate(plan: Plan, workload: Workload, machine: Machine) -> Prediction:
    """The step of one rank along the plan's own lists; at stage 3, where it has none, along lists
    of units that are used one after the other. Raises `PlanError`.
    """

def choose_buckets(
    plan: Plan,
    workload: Workload,
    machine: Machine,
    *,
    cap_bytes: int | None = None,
    cap_elements: int | None = None,
    windows: Sequence[int | None] = ...,
) -> tuple[int | None, int | None, int | None, Prediction]:
    """The bucket size and window with which the plan's parameters are fastest: (bytes or None,
    elements or None, window or None for all, the step).

    What is tried are sizes around the closed form and those that are given, each with each of
    `windows` and the plan's own. Raises `PlanError`.
    """

def default_bucket_bytes(
    params: Sequence[tuple[int, _Dtype, int | None, int]], *, world: int, stage: int
) -> tuple[int, _Bound]:
    """Bytes of a bucket among `world` ranks where nothing is measured and nobody has said how long
    one may become, and what decided it.

    "share" is a tenth of the trained parameters, those in a group, as they lie in memory. It is at
    "least" 1 MiB, at least 128 KiB a rank, a "message", and above all at "most" 25 MiB. Those are
    what a "unit" has at most, at stage 3.
    """

def guess_bucket_bytes(alpha_ns: float, byte_ns: float, rate: float, total: float) -> float:
    """The closed form of the best uniform bucket, in bytes, for `alpha_ns` a collective, `byte_ns`
    a byte, `rate` bytes a ns from the backward and `total` bytes.
    """
