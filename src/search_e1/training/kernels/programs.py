"""The kernels: one program per row of a chunk's logits, two or three passes over the vocabulary in blocks.

They read the raw products in float32, and apply bias, scale, soft cap and temperature on load:
``outer * tanh(inner * (z + bias))`` if ``CAPPED``, else ``inner * (z + bias)``. All sums are in float32, one per lane of a
block until the end of the row, which keeps rounding errors small.

No other module imports Triton. With ``TRITON_INTERPRET=1`` set before the import, the kernels run on a CPU.
"""

import triton
import triton.language as tl

# Initial value of a running maximum: not -inf, because -inf - -inf is NaN.
LEAST = tl.constexpr(-1e30)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _read(row, bias, columns, inside, inner, outer, CAPPED: tl.constexpr):
    """Logits over temperature at ``columns`` of a row."""
    z = tl.load(row + columns, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z *= inner
    if CAPPED:
        z = _tanh(z) * outer
    return z


@triton.jit
def _slope(z, outer, CAPPED: tl.constexpr):
    """Derivative of capped logits with respect to uncapped ones, up to a constant that is part of the rows' factors."""
    if CAPPED:
        return 1.0 - (z / outer) * (z / outer)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _terms(student, teacher, beta, log_beta, log_rest, DIVERGENCE: tl.constexpr):
    """From log-probabilities: the term of each entry, its derivative by the student's log-probability, and p_student."""
    p_student = tl.exp(student)
    if DIVERGENCE == "forward_kl":
        p_teacher = tl.exp(teacher)
        terms = p_teacher * (teacher - student)
        slopes = -p_teacher
    elif DIVERGENCE == "reverse_kl":
        terms = p_student * (student - teacher)
        slopes = terms + p_student
    else:
        of_student = student + log_rest
        of_teacher = teacher + log_beta
        mixture = tl.maximum(of_student, of_teacher) + tl.log(1.0 + tl.exp(-tl.abs(of_student - of_teacher)))
        slopes = (1.0 - beta) * p_student * (student - mixture)
        terms = slopes + beta * tl.exp(teacher) * (teacher - mixture)
    return terms, slopes, p_student


@triton.jit
def _clipped(terms, slopes, tau, CLIPPED: tl.constexpr):
    """Terms capped at ``tau``, with zero derivative where capped. NaN terms stay NaN."""
    if CLIPPED:
        cut = terms > tau
        slopes = tl.where(cut, 0.0, slopes)
        terms = tl.where(cut, tau, terms)
    return terms, slopes


@triton.jit
def _write(
    gradient, student, teacher, student_bias, teacher_bias, vocabulary, student_log_z, teacher_log_z, mass,
    student_inner, student_outer, teacher_inner, teacher_outer, tau, beta, log_beta, log_rest,
    DIVERGENCE: tl.constexpr, CLIPPED: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row of the divergence's gradient with respect to the student's logits; ``mass`` is the sum of the slopes."""
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        s = _read(student, student_bias, columns, inside, student_inner, student_outer, STUDENT_CAPPED)
        t = _read(teacher, teacher_bias, columns, inside, teacher_inner, teacher_outer, TEACHER_CAPPED)
        terms, slopes, p_student = _terms(s - student_log_z, t - teacher_log_z, beta, log_beta, log_rest, DIVERGENCE)
        terms, slopes = _clipped(terms, slopes, tau, CLIPPED)
        by_logit = (slopes - p_student * mass) * _slope(s, student_outer, STUDENT_CAPPED)
        tl.store(gradient + columns, by_logit.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def divergence(
    student,  # [rows, vocabulary], float32, contiguous; so is `teacher`
    teacher,
    gradient,  # same shape, any dtype; unused without WANTED
    student_bias,  # [vocabulary] or None
    teacher_bias,
    divergences,  # [rows], float32: the result
    vocabulary,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    tau,
    beta,
    log_beta,
    log_rest,  # log(1 - beta)
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    WANTED: tl.constexpr,
    ASIDE: tl.constexpr,  # `gradient` does not alias `teacher`
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's divergence, entries clipped, and its gradient with respect to the student's logits; formulas: ``divergence.py``.

    The gradient needs the sum of the slopes. For the forward KL it is -1 unless an entry is capped, which is rare: the summing
    pass writes the gradient under this assumption, and a row where it fails is written again.
    """
    ONCE: tl.constexpr = WANTED and ASIDE and DIVERGENCE == "forward_kl"
    row = tl.program_id(0).to(tl.int64)
    student += row * vocabulary
    teacher += row * vocabulary
    if WANTED:
        gradient += row * vocabulary

    student_most = tl.full([], LEAST, tl.float32)
    teacher_most = tl.full([], LEAST, tl.float32)
    student_sums = tl.zeros([BLOCK], tl.float32)
    teacher_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        s = _read(student, student_bias, columns, inside, student_inner, student_outer, STUDENT_CAPPED)
        t = _read(teacher, teacher_bias, columns, inside, teacher_inner, teacher_outer, TEACHER_CAPPED)
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
        student_next = tl.maximum(student_most, tl.max(s, 0))
        teacher_next = tl.maximum(teacher_most, tl.max(t, 0))
        student_sums = student_sums * tl.exp(student_most - student_next) + tl.exp(s - student_next)
        teacher_sums = teacher_sums * tl.exp(teacher_most - teacher_next) + tl.exp(t - teacher_next)
        student_most = student_next
        teacher_most = teacher_next
    student_log_z = student_most + tl.log(tl.sum(student_sums, 0))
    teacher_log_z = teacher_most + tl.log(tl.sum(teacher_sums, 0))

    sums = tl.zeros([BLOCK], tl.float32)
    masses = tl.zeros([BLOCK], tl.float32)
    highest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        s = _read(student, student_bias, columns, inside, student_inner, student_outer, STUDENT_CAPPED)
        t = _read(teacher, teacher_bias, columns, inside, teacher_inner, teacher_outer, TEACHER_CAPPED)
        terms, slopes, p_student = _terms(s - student_log_z, t - teacher_log_z, beta, log_beta, log_rest, DIVERGENCE)
        if ONCE:
            highest = tl.maximum(highest, tl.where(inside, terms, 0.0))
            by_logit = (slopes + p_student) * _slope(s, student_outer, STUDENT_CAPPED)
            tl.store(gradient + columns, by_logit.to(gradient.dtype.element_ty), mask=inside)
        terms, slopes = _clipped(terms, slopes, tau, CLIPPED)
        sums += tl.where(inside, terms, 0.0)
        masses += tl.where(inside, slopes, 0.0)
    tl.store(divergences + row, tl.sum(sums, 0))

    mass = tl.sum(masses, 0)
    if ONCE:
        if CLIPPED:  # noqa: SIM102 (a compile-time condition, then a run-time one)
            if tl.max(highest, 0) > tau:
                _write(
                    gradient, student, teacher, student_bias, teacher_bias, vocabulary, student_log_z, teacher_log_z,
                    mass, student_inner, student_outer, teacher_inner, teacher_outer, tau, beta, log_beta, log_rest,
                    DIVERGENCE, CLIPPED, STUDENT_CAPPED, TEACHER_CAPPED, BLOCK,
                )  # fmt: skip
    elif WANTED:
        _write(
            gradient, student, teacher, student_bias, teacher_bias, vocabulary, student_log_z, teacher_log_z,
            mass, student_inner, student_outer, teacher_inner, teacher_outer, tau, beta, log_beta, log_rest,
            DIVERGENCE, CLIPPED, STUDENT_CAPPED, TEACHER_CAPPED, BLOCK,
        )  # fmt: skip


@triton.jit
def token(
    logits,  # [rows, vocabulary], float32, contiguous
    gradient,  # same shape, any dtype; may alias `logits`; unused without WANTED
    bias,  # [vocabulary] or None
    targets,  # [rows], int64
    logprobs,  # [rows], float32: the results
    entropy,
    vocabulary,
    inner,
    outer,
    WANTED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's entropy, its target's log-probability, and the latter's gradient with respect to the logits, ``onehot - p``."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)

    most = tl.full([], LEAST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    # Sums of exp(z - most) (z - most): relative to the maximum, so that large logits cost the entropy no precision.
    moments = tl.zeros([BLOCK], tl.float32)
    at_target = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = _read(logits, bias, columns, inside, inner, outer, CAPPED)
        at_target += tl.where(columns == target, z, 0.0)
        greater = tl.maximum(most, tl.max(tl.where(inside, z, float("-inf")), 0))
        shrink = tl.exp(most - greater)
        below = z - greater
        weights = tl.where(inside, tl.exp(below), 0.0)
        moments = (moments + sums * (most - greater)) * shrink + weights * below
        sums = sums * shrink + weights
        most = greater
    total = tl.sum(sums, 0)
    log_total = tl.log(total)
    tl.store(logprobs + row, (tl.sum(at_target, 0) - most) - log_total)
    tl.store(entropy + row, log_total - tl.sum(moments, 0) / total)

    if WANTED:
        gradient += row * vocabulary
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            z = _read(logits, bias, columns, inside, inner, outer, CAPPED)
            by_logit = tl.where(columns == target, 1.0, 0.0) - tl.exp((z - most) - log_total)
            by_logit *= _slope(z, outer, CAPPED)
            tl.store(gradient + columns, by_logit.to(gradient.dtype.element_ty), mask=inside)
