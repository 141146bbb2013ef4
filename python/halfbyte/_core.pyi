"""The C++ extension. Tensors cross as address, shape and row stride (in elements; in bytes for codes, as
ld_bytes); the caller keeps them alive, and passes 0 for one that is not there.

dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 int32. activation codes: 0 none, 1 relu, 2 gelu, 3 gelu_tanh,
4 silu. Bad arguments raise ValueError, an id or a position outside its table IndexError, an instruction set
that this machine lacks RuntimeError.
"""

class PackedWeight:
    @property
    def op(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def activation_group(self) -> int: ...
    @property
    def stored(self) -> int: ...

def cpu_features() -> dict[str, bool]: ...
def kernels() -> list[dict[str, str | bool]]: ...
def select(op: str, isas: list[str] | None = None) -> str: ...
def force_isa(isa: str | None) -> str | None: ...
def build_info() -> dict[str, str | bool | list[str]]: ...
def thread_runtime() -> dict[str, str | int]: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def measure_peak(isa: str, threads: int, seconds: float) -> float: ...
def measure_read(nbytes: int, threads: int, seconds: float) -> float: ...
def quantize_rows(
    m: int,
    k: int,
    x: int,
    ldx: int,
    x_dtype: int,
    codes: int,
    ldc: int,
    scale: int,
    zero: int,
    sum: int,
    symmetric: bool,
    static_scale: float,
    static_zero: int,
    group: int,
    wide16: bool,
    threads: int,
) -> None: ...
def pack_linear(
    op: str,
    codes: int,
    n: int,
    k: int,
    ld_bytes: int,
    scale: int,
    group: int = 0,
    group_scale: int = 0,
    group_scale_type: int = 0,
    zero: int = 0,
    minimum: int = 0,
    nf4: bool = False,
    activation_group: int = 0,
    threads: int = 0,
) -> PackedWeight: ...
def pack_sparse(
    op: str,
    weight: int,
    dtype: int,
    n: int,
    k: int,
    ld: int,
    scale: int = 0,
    nonzero: int = 0,
    of: int = 0,
    threads: int = 0,
) -> PackedWeight: ...
def unpack_linear(packed: PackedWeight, codes: int, ld_bytes: int) -> None: ...
def linear(
    packed: PackedWeight,
    m: int,
    a: int,
    lda: int,
    a_dtype: int,
    c: int,
    ldc: int,
    c_dtype: int,
    bias: int,
    activation: int,
    residual: int,
    ldr: int,
    residual_dtype: int,
    static_scale: float,
    static_zero: int,
    threads: int,
    gate: PackedWeight | None = None,
    gate_bias: int = 0,
) -> None: ...
def linears(
    weights: list[tuple[PackedWeight, int, int, int]],  # with the addresses of output and bias, and a stride
    m: int,
    a: int,
    lda: int,
    a_dtype: int,
    c_dtype: int,
    activation: int,
    static_scale: float,
    static_zero: int,
    threads: int,
) -> None: ...
def embedding(
    codes: int,
    n: int,
    k: int,
    ld_bytes: int,
    bits: int,
    nf4: bool,
    scale: int,
    group: int,
    group_scale: int,
    group_scale_type: int,
    zero: int,
    minimum: int,
    ids: int,
    m: int,
    out: int,
    ldo: int,
    out_type: int,
    threads: int,
) -> None: ...
def norm(
    rms: bool,
    m: int,
    k: int,
    x: int,
    ldx: int,
    x_dtype: int,
    residual: int,
    ldr: int,
    residual_dtype: int,
    weight: int,
    bias: int,
    eps: float,
    sum_out: int,
    lds: int,
    sum_dtype: int,
    out: int,
    ldo: int,
    out_dtype: int,
    codes: int,
    ldc: int,
    scale: int,
    zero: int,
    sum: int,
    symmetric: bool,
    static_scale: float,
    static_zero: int,
    group: int,
    wide16: bool,
    threads: int,
) -> None: ...
def rope(
    m: int,
    tokens: int,
    heads: int,
    head_size: int,
    x: int,
    x_dtype: int,
    x_strides: tuple[int, int, int],  # of a batch, a row and a head
    out: int,
    out_dtype: int,
    out_strides: tuple[int, int, int],
    rotary_dims: int,
    interleaved: bool,
    cos: int,
    sin: int,
    table: int,
    positions: int,
    first_position: int,
    threads: int,
) -> None: ...
def attention(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    q: int,
    q_strides: tuple[int, int, int],  # of a sequence, a row and a head, in elements, as the others
    q_dtype: int,
    k: int,
    k_strides: tuple[int, int, int],
    v: int,
    v_strides: tuple[int, int, int],
    kv_storage: int,  # 0 float32, 1 bfloat16, 2 float16, 3 int8
    k_scale: int,
    k_scale_strides: tuple[int, int, int],
    v_scale: int,
    v_scale_strides: tuple[int, int, int],
    scale: float,
    causal: bool,
    offset: int,
    window: int,
    mask: int,
    mask_kind: int,  # 0 none, 1 float32 that is added, 2 bytes, true where a query sees a key
    mask_strides: tuple[int, int, int, int],  # of a sequence, a head, a query and a key
    out: int,
    out_strides: tuple[int, int, int],
    out_dtype: int,
    threads: int,
) -> None: ...

class LinearPlan:
    """The short way of PackedLayer.forward: checks, output and kernel in one call; None where it will not do.

    watched: entries as Watch takes them; what has changed makes the plan stale. recorders: functions that
    return something true while a mode or a tracer has to see the call. forward_ad: the variables of
    torch.autograd.forward_ad. hooks: dictionaries that are empty unless a hook has to run.
    """

    def __init__(
        self,
        packed: PackedWeight,
        watched: list[tuple[dict, str, object, int]],
        tensor_type: type,
        dtypes: tuple[object, object, object],
        recorders: list[object],
        hooks: list[dict],
        forward_ad: dict,
        bias: int,
        static_scale: float,
        static_zero: int,
    ) -> None: ...
    def __call__(self, x: object, activation: int, threads: int, hooks_checked: bool) -> object | None: ...
    @staticmethod
    def together(
        x: object,
        given: tuple[tuple[LinearPlan, int, LinearPlan | None, object | None], ...],
        norm: tuple[bool, int, int, float] | None,
        threads: int,
    ) -> list | None:
        """What up to three layers that quantize alike make of one x [..., k], through a norm if one is given.

        given: (plan, activation, plan of the gate or None, residual [..., n] of the dtype of x, or None) of
        each: `(x W^T + bias) * activation(x G^T + gate_bias) + residual`, or `activation(x W^T + bias) +
        residual`. norm: (whether it is an RMSNorm, weight, bias, eps), addresses of float32 [k] that the
        caller keeps alive, 0 where there is none. Returns the outputs [..., n], of the dtype of x.
        """

class Watch:
    """Notices changes. entries: (dictionary, key, object or None, version): an object that is another one
    now, or a tensor with other memory (version >= -1) or another version (>= 0); version -3: whether the
    dictionary has got more or fewer keys. empty: dictionaries of
    hooks.
    """

    def __init__(self, entries: list[tuple[dict, str, object, int]], empty: list[dict]) -> None: ...
    def unchanged(self) -> bool: ...

class Stack:
    """Transformer blocks, packed. Norms: (weight, bias, eps); linears: (packed, bias, static scale, static
    zero); vectors are addresses of float32, 0 where there is none, which the caller keeps alive.
    """

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        scale: float,
        pre_norm: bool,
        rms: bool,
        causal: bool,
        window: int,
        activation: int,
        rotary_dims: int,
        interleaved: bool,
        first_norm: tuple[int, int, float] | None,
        last_norm: tuple[int, int, float] | None,
        blocks: list[dict],
    ) -> None: ...

class StackCall:
    """Calls a stack, with a cache or without one: a dictionary of addresses, strides and sizes."""

    def __init__(self, stack: Stack, cache: dict[str, int] | None = None) -> None: ...
    def __call__(
        self,
        x: int,
        ldx: int,
        x_dtype: int,
        out: int,
        ldo: int,
        out_dtype: int,
        batch: int,
        tokens: int,
        mask: tuple[int, int, int, int, int, int] | None,  # address, 1 added or 2 boolean, strides
        past: int,
        positions: int,
        cos: int,
        sin: int,
        table_rows: int,
        first_block: int,
        last_block: int,
        events: int,  # room for so many; 0: not profiled
        threads: int,
    ) -> list[tuple[int, int, int, int, int]] | None: ...

def pack_float(weight: int, dtype: int, n: int, k: int, ld: int, threads: int = 0) -> PackedWeight: ...
def buffer_allocations() -> int: ...
