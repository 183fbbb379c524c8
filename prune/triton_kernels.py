"""The kernels of DynamicPrune in Triton.

`token_cosines`, `select_segments`, `compact_segments`, and for frames whose segments have not as many tokens
each `select_uneven_segments`, `compact_uneven_segments`. Keys and values are (batch, heads, tokens, WIDTH),
contiguous. The candidates' tokens are those of the frames [transition frame, new 0, new 1, ...] but the last;
the transition frame may be absent (0 tokens, any pointer). Offsets are 64-bit. What is written in capitals is
a constant of the compilation; WIDTH need not be a power of two. None uses atomics and every sum has one
order, so a launch repeated gives the same bits. How many programs a launch has: `launcher`. How they become
cubins: `kernel_compiler`.

Importing this raises MissingExtraError where Triton is not installed.
"""
# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from forcingkv.headmaps.errors import MissingExtraError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError("triton", "engines") from error


@triton.jit
def token_cosines(
    transition_keys: tl.tensor,
    new_keys: tl.tensor,
    cosines: tl.tensor,
    heads: tl.int32,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    frame_tokens: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """cosines[p]: between a candidate's token p and the one at its place a frame later, in float32.

    A token's vector is its keys of all heads side by side, of batch item 0. BLOCK tokens a program.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)  # noqa: N806
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (place < frame_tokens)[:, None] & (column < WIDTH)[None, :]
    spot = place.to(tl.int64)[:, None] * WIDTH + column[None, :]

    # A frame lies wholly in the one or the other tensor.
    first = tl.program_id(1) * frame_tokens
    old = first < transition_tokens
    keys = tl.multiple_of(tl.where(old, transition_keys, new_keys), 16)
    tokens = tl.where(old, transition_tokens, new_tokens)
    start = tl.where(old, first, first - transition_tokens)
    later_first = first + frame_tokens
    later_old = later_first < transition_tokens
    later_keys = tl.multiple_of(tl.where(later_old, transition_keys, new_keys), 16)
    later_tokens = tl.where(later_old, transition_tokens, new_tokens)
    later_start = tl.where(later_old, later_first, later_first - transition_tokens)

    dot = tl.zeros((BLOCK, COLUMNS), tl.float32)
    power = tl.zeros((BLOCK, COLUMNS), tl.float32)
    later_power = tl.zeros((BLOCK, COLUMNS), tl.float32)
    row = start.to(tl.int64)
    later_row = later_start.to(tl.int64)
    for _ in range(heads):
        x = tl.load(keys + row * WIDTH + spot, mask, 0.0).to(tl.float32)
        y = tl.load(later_keys + later_row * WIDTH + spot, mask, 0.0).to(tl.float32)
        dot += x * y
        power += x * x
        later_power += y * y
        row += tokens
        later_row += later_tokens

    norm = tl.maximum(tl.sqrt_rn(tl.sum(power, 1)), 1e-8)
    later_norm = tl.maximum(tl.sqrt_rn(tl.sum(later_power, 1)), 1e-8)
    cosine = tl.div_rn(tl.sum(dot, 1), norm * later_norm)
    tl.store(cosines + first + place, cosine, place < frame_tokens)


@triton.jit
def _store_least(
    similarity: tl.tensor, present: tl.tensor, segment: tl.tensor, indices: tl.tensor, kept: tl.int32
) -> None:
    """Store the `kept` segments of least similarity, ascending; of equals the first."""
    # What is no number comes last, and absent candidates after it: ranks stay a permutation.
    similarity = tl.where(present & (similarity == similarity), similarity, float("inf"))

    before = segment[None, :] < segment[:, None]
    less = similarity[None, :] < similarity[:, None]
    equal = similarity[None, :] == similarity[:, None]
    rank = tl.sum((less | (equal & before)).to(tl.int32), 1)
    chosen = rank < kept
    place = tl.sum((before & chosen[None, :]).to(tl.int32), 1)
    tl.store(indices + place, segment.to(tl.int64), chosen)


@triton.jit
def select_segments(
    cosines: tl.tensor,
    indices: tl.tensor,
    segment_tokens: tl.int32,
    candidates: tl.int32,
    kept: tl.int32,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """indices: the `kept` segments of least mean cosine, ascending; of equals the first. One program.

    CANDIDATES is a power of two, at least `candidates`. Every segment is summed in the same order, so
    equal segments have equal means.
    """
    segment = tl.arange(0, CANDIDATES)
    column = tl.arange(0, BLOCK)
    present = segment < candidates
    sums = tl.zeros((CANDIDATES, BLOCK), tl.float32)
    for start in range(0, segment_tokens, BLOCK):
        token = start + column
        mask = present[:, None] & (token < segment_tokens)[None, :]
        sums += tl.load(cosines + segment[:, None] * segment_tokens + token[None, :], mask, 0.0)
    similarity = tl.div_rn(tl.sum(sums, 1), segment_tokens.to(tl.float32))
    _store_least(similarity, present, segment, indices, kept)


@triton.jit
def _start(index: tl.tensor, frame_tokens: tl.int32, segments: tl.int32) -> tl.tensor:
    """The first token of a segment (`runtime.kv.segments.Split`)."""
    return index // segments * frame_tokens + index % segments * frame_tokens // segments


@triton.jit
def select_uneven_segments(
    cosines: tl.tensor,
    indices: tl.tensor,
    frame_tokens: tl.int32,
    segments: tl.int32,
    candidates: tl.int32,
    kept: tl.int32,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`select_segments` for frames whose segments have not as many tokens each."""
    segment = tl.arange(0, CANDIDATES)
    column = tl.arange(0, BLOCK)
    present = segment < candidates
    first = _start(segment, frame_tokens, segments)
    tokens = _start(segment + 1, frame_tokens, segments) - first
    sums = tl.zeros((CANDIDATES, BLOCK), tl.float32)
    for start in range(0, frame_tokens // segments + 1, BLOCK):
        token = start + column
        mask = present[:, None] & (token[None, :] < tokens[:, None])
        sums += tl.load(cosines + first[:, None] + token[None, :], mask, 0.0)
    similarity = tl.div_rn(tl.sum(sums, 1), tokens.to(tl.float32))
    _store_least(similarity, present, segment, indices, kept)


@triton.jit
def _copy_segments(
    transition_keys: tl.tensor,
    transition_values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    indices: tl.tensor,
    retained_keys: tl.tensor,
    retained_values: tl.tensor,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    segment_tokens: tl.int32,
    frame_tokens: tl.int32,
    segments: tl.int32,
    kept: tl.int32,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """What both kernels do that copy; `frame_tokens` and `segments` matter where segments are not EVEN."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)  # noqa: N806
    column = tl.arange(0, COLUMNS)
    blocks = tl.cdiv(segment_tokens, BLOCK)
    slot = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (place < segment_tokens)[:, None] & (column < WIDTH)[None, :]
    spot = place.to(tl.int64)[:, None] * WIDTH + column[None, :]
    head = tl.program_id(1).to(tl.int64)

    # Indices may be garbage, of any size: TensorRT's builder times layers on inputs of its own making. They
    # are bounded before anything is computed with them, so that whatever they are, a segment is read.
    tokens = transition_tokens + new_tokens
    present = tokens // segment_tokens if EVEN else tokens // frame_tokens * segments
    index = tl.minimum(tl.maximum(tl.load(indices + slot), 0), present - 1)
    token = index * segment_tokens if EVEN else _start(index, frame_tokens, segments)
    # A segment lies wholly in the one or the other tensor.
    old = token < transition_tokens
    row = tl.where(old, head * transition_tokens + token, head * new_tokens + token - transition_tokens)
    out = (head * kept + slot) * segment_tokens
    is_values = tl.program_id(2) == 1
    transition = tl.where(is_values, transition_values, transition_keys)
    new = tl.where(is_values, new_values, new_keys)
    source = tl.multiple_of(tl.where(old, transition, new), 16)
    retained = tl.multiple_of(tl.where(is_values, retained_values, retained_keys), 16)
    tl.store(retained + out * WIDTH + spot, tl.load(source + row * WIDTH + spot, mask), mask)


@triton.jit
def compact_segments(
    transition_keys: tl.tensor,
    transition_values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    indices: tl.tensor,
    retained_keys: tl.tensor,
    retained_values: tl.tensor,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    segment_tokens: tl.int32,
    kept: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Retained keys and values: the rows of the segments in `indices`, in that order, unchanged.

    Programs: (kept * blocks of a segment, batch * heads, 2), the last telling keys from values.
    """
    _copy_segments(
        transition_keys,
        transition_values,
        new_keys,
        new_values,
        indices,
        retained_keys,
        retained_values,
        transition_tokens,
        new_tokens,
        segment_tokens,
        0,
        0,
        kept,
        True,
        WIDTH,
        BLOCK,
    )


@triton.jit
def compact_uneven_segments(
    transition_keys: tl.tensor,
    transition_values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    indices: tl.tensor,
    retained_keys: tl.tensor,
    retained_values: tl.tensor,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    frame_tokens: tl.int32,
    segments: tl.int32,
    kept: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`compact_segments` where segments are uneven: of each its first `frame_tokens // segments` tokens."""
    _copy_segments(
        transition_keys,
        transition_values,
        new_keys,
        new_values,
        indices,
        retained_keys,
        retained_values,
        transition_tokens,
        new_tokens,
        frame_tokens // segments,
        frame_tokens,
        segments,
        kept,
        False,
        WIDTH,
        BLOCK,
    )
