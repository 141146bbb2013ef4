"""The C++ extension. Tensors cross as address, shape and row stride (in elements; in bytes for codes, as
ld_bytes); the caller keeps them alive, and passes 0 for one that is not there.

dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 int32. activation codes: 0 none, 1 relu, 2 gelu, 3 gelu_tanh,
4 silu. Bad arguments raise ValueError, an id outside an embedding IndexError, an instruction set that this
machine lacks RuntimeError.
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

class LinearPlan:
    """The short way of QLinear.forward: checks, output and kernel in one call; None where it does not apply.

    watched: (buffer name, tensor or None, its version or -1); a buffer that is another one now, or was
    changed in place, makes the plan stale. recorders: functions that return something true while a mode or a
    tracer has to see the call. forward_ad: the variables of torch.autograd.forward_ad. hooks: dictionaries
    that are empty unless a hook has to run.
    """

    def __init__(
        self,
        packed: PackedWeight,
        buffers: dict[str, object],
        watched: list[tuple[str, object, int]],
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
