"""The algorithm once more: float64, plain loops, written from the design and sharing no code with the package.

Tensors come in as nested lists (``tensor.tolist()``); what comes out are nested lists of Python floats.
"""

import math

PERCEPTION, REASONING = 1, 2


def log_ratio(log_prob, other):
    """A token that both sides bar is the same for both; one that a single side bars counts as 20 nats."""
    if log_prob == other == -math.inf:
        return 0.0
    if log_prob == -math.inf:
        return -20.0
    if other == -math.inf:
        return 20.0
    return log_prob - other


def contrast(log_prob, other, kind, clip):
    delta = log_ratio(log_prob, other)
    if kind == "positive":
        delta = max(delta, 0.0)
    elif kind == "abs":
        delta = abs(delta)
    elif kind == "k3":
        delta = math.exp(-delta) + delta - 1.0
    return min(max(delta, -clip), clip)


def scores(log_probs, others, roles, mask, role, kind="log_ratio", clip=5.0):
    return [
        [contrast(p, q, kind, clip) if real and r == role else 0.0 for p, q, r, real in zip(*rows, strict=True)]
        for rows in zip(log_probs, others, roles, mask, strict=True)
    ]


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def divergence(logits, other, kind, temperature=1.0, top_k=64):
    p, q = softmax(logits, temperature), softmax(other, temperature)

    def kl(a, b):
        return sum(x * math.log(x / y) if y > 0 else math.inf for x, y in zip(a, b, strict=True) if x > 0)

    if kind == "full_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        return (kl(p, middle) + kl(q, middle)) / 2
    kept = sorted(range(len(p)), key=lambda v: -p[v])[:top_k]
    rest = [v for v in range(len(p)) if v not in kept]
    return kl([p[v] for v in kept] + [sum(p[v] for v in rest)], [q[v] for v in kept] + [sum(q[v] for v in rest)])


def weights(
    scores,
    roles,
    mask,
    *,
    strength=1.0,
    baseline="token",
    weight_map="exp_tanh",
    renormalization="trajectory",
    visual_scale=1.0,
    consistency_scale=1.0,
    sign="symmetric",
    advantages=None,
    mix=1.0,
    **parameters,
):
    result = []
    for i in range(len(roles)):
        row = [1.0 if real else 0.0 for real in mask[i]]
        members = [t for t in range(len(row)) if mask[i][t] and roles[i][t] in (PERCEPTION, REASONING)]
        if len(members) >= 2:
            u = {t: scores[i][t] / (visual_scale if roles[i][t] == PERCEPTION else consistency_scale) for t in members}
            center = _baseline(u, roles[i], members, baseline)
            direction = 1.0
            if sign == "advantage":
                direction = (advantages[i] > 0) - (advantages[i] < 0)
            x = {t: direction * (u[t] - center[t]) for t in members}
            v = _map(x, members, weight_map, strength, **parameters)
            for t in members:
                if renormalization == "trajectory":
                    peers = members
                elif renormalization == "per_role":
                    peers = [k for k in members if roles[i][k] == roles[i][t]]
                else:
                    peers = None
                w = v[t] if peers is None else v[t] / (math.fsum(v[k] for k in peers) / len(peers))
                row[t] = (1.0 - mix) + mix * w
        result.append(row)
    return result


def _baseline(u, roles, members, kind):
    def mean(of):
        return math.fsum(u[t] for t in of) / len(of)

    by_role = {role: [t for t in members if roles[t] == role] for role in (PERCEPTION, REASONING)}
    if kind == "token":
        return dict.fromkeys(members, mean(members))
    if kind == "role_balanced":
        means = [mean(of) for of in by_role.values() if of]
        return dict.fromkeys(members, sum(means) / len(means))
    if kind == "per_role":
        return {t: mean(by_role[roles[t]]) for t in members}
    if kind == "median":
        ordered = sorted(u.values())
        n = len(ordered)
        return dict.fromkeys(members, (ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
    return dict.fromkeys(members, 0.0)


def _map(x, members, kind, strength, bound=0.6931471805599453):
    if kind == "exp_tanh":
        return {t: math.exp(strength * bound * math.tanh(x[t] / bound)) for t in members}
    if kind == "exp_clip":
        return {t: math.exp(strength * min(max(x[t], -bound), bound)) for t in members}
    if kind == "one_plus_tanh":
        return {t: 1 + (1 - math.exp(-bound)) * math.tanh(strength * x[t]) for t in members}
    # Kept to e^40 in either direction, which float32 holds.
    exponent = {t: min(max(strength * x[t], -40.0), 40.0) for t in members}
    if kind == "sigmoid":
        return {t: 2 / (1 + math.exp(-exponent[t])) for t in members}
    if kind == "softplus":
        return {t: math.log1p(math.exp(exponent[t])) / math.log(2) for t in members}
    total = math.fsum(map(math.exp, exponent.values()))
    return {t: len(members) * math.exp(exponent[t]) / total for t in members}


def _std(values):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1))


def group_advantages(rewards, group_ids, normalization="std", epsilon=1e-4, lengths=None):
    result = []
    for i, reward in enumerate(rewards):
        group = [r for r, g in zip(rewards, group_ids, strict=True) if g == group_ids[i]]
        if len(set(group)) == 1:
            result.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        if normalization == "std":
            std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
            result.append((reward - mean) / (std + epsilon))
        elif normalization == "batch_std":
            result.append((reward - mean) / (_std(rewards) + epsilon))
        elif normalization == "length_weighted":
            tokens = [n for n, g in zip(lengths, group_ids, strict=True) if g == group_ids[i]]
            weighed = math.fsum(n * r for n, r in zip(tokens, group, strict=True))
            result.append(reward - weighed / sum(tokens))
        elif normalization == "none":
            result.append(reward - mean)
        else:
            others = (math.fsum(group) - reward) / (len(group) - 1)
            result.append(reward - others)
    return result


def multi_reward_advantages(rewards, group_ids, coefficients, epsilon=1e-4):
    columns = [group_advantages(column, group_ids, epsilon=epsilon) for column in zip(*rewards, strict=True)]
    total = [math.fsum(c * x for c, x in zip(coefficients, row, strict=True)) for row in zip(*columns, strict=True)]
    return [x / (_std(total) + epsilon) if x else 0.0 for x in total]


def top_entropy_mask(entropy, mask, share):
    real = sorted(
        (x for rows in zip(entropy, mask, strict=True) for x, r in zip(*rows, strict=True) if r), reverse=True
    )
    return [
        [r and x >= real[math.floor(share * (len(real) - 1))] for x, r in zip(*rows, strict=True)]
        for rows in zip(entropy, mask, strict=True)
    ]


def engine_weights(old_log_probs, engine_log_probs, mask, level, out_of_bounds, low, high):
    result = []
    for rows in zip(old_log_probs, engine_log_probs, mask, strict=True):
        deltas = [log_ratio(p, q) if r and not math.isnan(q) else 0.0 for p, q, r in zip(*rows, strict=True)]
        row = []
        for delta, real in zip(deltas, rows[2], strict=True):
            exponent = delta if level == "token" else math.fsum(deltas)
            weight = math.exp(min(max(exponent, -20.0), 20.0))
            if not low <= weight <= high:
                weight = 0.0 if out_of_bounds == "mask" else min(max(weight, low), high)
            row.append(weight if real else 0.0)
        result.append(row)
    return result


def surrogate(log_probs, old_log_probs, advantages, mask, kind, **parameters):
    """Token losses; ratios without a gradient (CISPO, GSPO-token) have the same value as those with one."""
    low, high, dual = (parameters.get(*each) for each in (("low", 0.2), ("high", 0.2), ("dual", None)))
    result = []
    for new, old, advantage, real in zip(log_probs, old_log_probs, advantages, mask, strict=True):
        count = sum(real)
        deltas = [log_ratio(p, q) for p, q, r in zip(new, old, real, strict=True) if r]
        mean = math.fsum(deltas) / count if count else 0.0
        row = []
        for p, q, a, r in zip(new, old, advantage, real, strict=True):
            if not r:
                row.append(0.0)
                continue
            ratio = math.exp(min(max(mean if kind.startswith("gspo") else log_ratio(p, q), -20.0), 20.0))
            if kind == "cispo":
                loss = -_cispo_weight(ratio, **parameters) * a * (0.0 if p == -math.inf else p)
            elif kind == "vespo":
                loss = -_vespo_weight(math.fsum(deltas), a, **parameters) * a * (0.0 if p == -math.inf else p)
            elif kind == "sapo":
                tau = _temperature(a, **parameters)
                loss = -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * a
            else:
                loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
                if dual is not None and a < 0:
                    loss = min(loss, -dual * a)
            row.append(loss)
        result.append(row)
    return result


def surrogate_slopes(log_probs, old_log_probs, advantages, mask, kind, **parameters):
    """Derivative of the summed token losses by each log-prob: 0 at a token that either policy bars."""
    low, high, dual = (parameters.get(*each) for each in (("low", 0.2), ("high", 0.2), ("dual", None)))

    def slope(delta, a):
        """By the log-ratio."""
        if abs(delta) > 20.0:
            return 0.0
        ratio = math.exp(delta)
        if kind == "sapo":
            gate = 1 / (1 + math.exp(-_temperature(a, **parameters) * (ratio - 1)))
            return -4 * gate * (1 - gate) * ratio * a
        held = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        return 0.0 if held or (dual is not None and a < 0 and ratio > dual) else -ratio * a

    result = []
    for new, old, advantage, real in zip(log_probs, old_log_probs, advantages, mask, strict=True):
        deltas = [log_ratio(p, q) for p, q, r in zip(new, old, real, strict=True) if r]
        mean = math.fsum(deltas) / len(deltas) if deltas else 0.0
        row = []
        for p, q, a, r in zip(new, old, advantage, real, strict=True):
            if not r or -math.inf in (p, q):
                row.append(0.0)
            elif kind == "cispo":
                row.append(-_cispo_weight(math.exp(min(max(p - q, -20.0), 20.0)), **parameters) * a)
            elif kind == "vespo":
                row.append(-_vespo_weight(math.fsum(deltas), a, **parameters) * a)
            else:
                # All tokens of a GSPO response have one advantage, and the mean moves them by 1/n each: n times 1/n.
                row.append(slope(mean if kind.startswith("gspo") else p - q, a))
        result.append(row)
    return result


def _cispo_weight(ratio, max_ratio=5.0, min_ratio=0.0):
    return min(max(ratio, min_ratio), max_ratio)


def _vespo_weight(log_w, advantage, shape_positive=2.0, rate_positive=3.0, shape_negative=3.0, rate_negative=2.0):
    k, rate = (shape_positive, rate_positive) if advantage > 0 else (shape_negative, rate_negative)
    log_w = min(max(log_w, -20.0), 20.0)
    return math.exp(min(max(k * log_w + rate * (1.0 - math.exp(log_w)), -20.0), 20.0))


def off_policy_dropped(log_probs, old_log_probs, advantages, mask, threshold):
    """Which tokens have a negative advantage in a response whose old policy is too much likelier, in the mean."""
    result = []
    for new, old, advantage, real in zip(log_probs, old_log_probs, advantages, mask, strict=True):
        gone = [-log_ratio(p, q) for p, q, r in zip(new, old, real, strict=True) if r]
        far = bool(gone) and math.fsum(gone) / len(gone) > threshold
        result.append([far and r and a < 0 for a, r in zip(advantage, real, strict=True)])
    return result


def _temperature(advantage, temperature_positive=1.0, temperature_negative=1.05):
    return temperature_positive if advantage > 0 else temperature_negative


def surrogate_metrics(log_probs, old_log_probs, advantages, mask, kind, **parameters):
    """What a surrogate reports of itself: shares of the real tokens, or the mean slope of the gate."""
    tokens, gates = [], []
    for new, old, advantage, real in zip(log_probs, old_log_probs, advantages, mask, strict=True):
        deltas = [log_ratio(p, q) for p, q, r in zip(new, old, real, strict=True) if r]
        mean = math.fsum(deltas) / len(deltas) if deltas else 0.0
        credit = [a for a, r in zip(advantage, real, strict=True) if r]
        tokens += [(math.exp(mean if kind.startswith("gspo") else d), a) for d, a in zip(deltas, credit, strict=True)]
        gates += [_vespo_weight(math.fsum(deltas), a, **parameters) for a in credit] if kind == "vespo" else []

    def average(of, empty=0.0):
        return math.fsum(of(ratio, a) for ratio, a in tokens) / len(tokens) if tokens else empty

    def slope(ratio, a):
        gate = 1 / (1 + math.exp(-_temperature(a, **parameters) * (ratio - 1)))
        return 4 * gate * (1 - gate)

    if kind == "cispo":
        result = {"clip/high": average(lambda ratio, a: ratio > parameters.get("max_ratio", 5.0))}
        if (least := parameters.get("min_ratio", 0.0)) > 0:
            result["clip/low"] = average(lambda ratio, a: ratio < least)
        return result
    if kind == "vespo":
        return {"gate/mean": math.fsum(gates) / len(gates) if gates else 1.0}
    if kind == "sapo":
        return {"gate/mean": average(slope, empty=1.0)}
    low, high, dual = (parameters.get(*each) for each in (("low", 0.2), ("high", 0.2), ("dual", None)))
    metrics = {
        "clip/low": average(lambda ratio, a: ratio < 1 - low and a < 0),
        "clip/high": average(lambda ratio, a: ratio > 1 + high and a > 0),
    }
    if dual is not None:
        metrics["clip/dual"] = average(lambda ratio, a: ratio > dual and a < 0)
    return metrics


def k3(delta):
    """The estimate up to 5 nats, and from there on a straight line of its value and its slope, e^5 - 1, at 5."""
    if delta <= 5.0:
        return math.exp(delta) - delta - 1.0
    return (math.exp(5.0) - 5.0 - 1.0) + (math.exp(5.0) - 1.0) * (delta - 5.0)


def kl_penalty(log_probs, ref_log_probs, mask, estimator="k3", old_log_probs=None):
    def estimate(p, ref):
        delta = log_ratio(ref, p)
        return {"k3": k3(delta), "k1": -delta, "k2": delta * delta / 2, "abs": abs(delta)}[estimator]

    def factor(i, t):
        if old_log_probs is None:
            return 1.0
        return math.exp(min(max(log_ratio(log_probs[i][t], old_log_probs[i][t]), -20.0), 20.0))

    return [
        [factor(i, t) * estimate(p, ref) if real else 0.0 for t, (p, ref, real) in enumerate(zip(*rows, strict=True))]
        for i, rows in enumerate(zip(log_probs, ref_log_probs, mask, strict=True))
    ]


def aggregate(losses, mask, reduction="token_mean", normalizer=None):
    rows = [[x for x, real in zip(*pair, strict=True) if real] for pair in zip(losses, mask, strict=True)]
    rows = [row for row in rows if row]
    if reduction == "sequence_mean":
        total, count = math.fsum(math.fsum(row) / len(row) for row in rows), len(rows)
    elif reduction == "sequence_sum":
        total, count = math.fsum(math.fsum(row) for row in rows), len(rows)
    else:
        total, count = math.fsum(x for row in rows for x in row), sum(map(len, rows))
    if reduction == "sum":
        return total
    return total / (normalizer if normalizer is not None else max(count, 1))


def _mean_one(values, roles, mask, known):
    """One row: values over their mean where known, 1 at the other perception tokens, 0 elsewhere."""
    perception = [t for t in range(len(mask)) if mask[t] and roles[t] == PERCEPTION]
    members = [t for t in perception if known[t]]
    mean = math.fsum(values[t] for t in members) / len(members) if members else 0.0
    row = [0.0] * len(mask)
    for t in perception:
        row[t] = values[t] / mean if t in members and mean > 0 else 1.0
    return row


def linear_reliance(coefficients, log_probs, roles, mask):
    """Reliance by gradient where token r has log-odds sum_t <coefficients[r][t], e_t>: these are the gradient."""
    result = []
    for row in range(len(mask)):
        time = range(len(mask[row]))
        reasoning = [r for r in time if mask[row][r] and roles[row][r] == REASONING]
        values = []
        for t in time:
            gradient = [0.0] * len(coefficients[row][t][t])
            for r in reasoning:
                if log_probs[row][r] == -math.inf:
                    continue  # barred: it has no gradient
                # Of log p the slope is 1 - p; that of the log-odds undoes it, except near certainty, where 1 - p has no
                # digits left unless expm1 keeps them: shares of a gradient of 1e-20 are shares all the same.
                factor = math.expm1(log_probs[row][r]) / math.expm1(min(log_probs[row][r], -1e-3))
                gradient = [g + factor * x for g, x in zip(gradient, coefficients[row][r][t], strict=True)]
            values.append(math.sqrt(math.fsum(g * g for g in gradient)))
        result.append(_mean_one(values, roles[row], mask[row], [bool(reasoning)] * len(mask[row])))
    return result


def spans(roles, mask, count):
    result = []
    for row_roles, row_mask in zip(roles, mask, strict=True):
        perception = [t for t in range(len(row_mask)) if row_mask[t] and row_roles[t] == PERCEPTION]
        row = [-1] * len(row_mask)
        pieces = min(count, len(perception))
        for k in range(pieces):
            # Span k begins at the first token whose share of the way is at least k of the pieces.
            start, end = (-(-edge * len(perception) // pieces) for edge in (k, k + 1))
            for t in perception[start:end]:
                row[t] = k
        result.append(row)
    return result


def span_reliance(log_probs, without, spans, roles, mask, clip=5.0):
    result = []
    for i in range(len(mask)):
        reasoning = [t for t in range(len(mask[i])) if mask[i][t] and roles[i][t] == REASONING]
        lost = [math.fsum(contrast(log_probs[i][r], w[i][r], "positive", clip) for r in reasoning) for w in without]
        values = [lost[k] if 0 <= k < len(lost) else 0.0 for k in spans[i]]
        result.append(_mean_one(values, roles[i], mask[i], [k >= 0 for k in spans[i]]))
    return result


def apply_reliance(scores, reliance, roles, mask, mode="product"):
    result = []
    for i in range(len(mask)):
        perception = [t for t in range(len(mask[i])) if mask[i][t] and roles[i][t] == PERCEPTION]
        row = list(scores[i])
        for t in perception:
            score = scores[i][t] if mode == "product" else math.fsum(scores[i][k] for k in perception) / len(perception)
            row[t] = score * reliance[i][t]
        result.append(row)
    return result
