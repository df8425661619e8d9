"""Each kind of projection against its matrix, written out, and gradients from a backward pass of each unit's own."""

import json
import math

import pytest
import torch
from models import build, collate, rows_for
from oracles import language_model, per_sample_gradients, token_losses, trainable
from test_projection import every_layer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from hf_datashapley.attribution import projection as kinds
from hf_datashapley.attribution.projection import described_projection, projection_for
from hf_datashapley.ghost import whole
from hf_datashapley.ghost.bits import Bits
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.plans import Plan
from hf_datashapley.ghost.projection import features_of, leaves
from hf_datashapley.ghost.sides import SidedMap
from hf_datashapley.ghost.units import Rows, Runs
from hf_datashapley.ghost.whole import DenseMap, SparseMap


CPU = torch.device("cpu")
DOUBLE = torch.float64
# Narrower than rows of a weight, wider than some, wider than some weights; None: the gradient itself.
KINDS = [
    ("logra", 600),
    ("logra", 3000),
    ("sjlt", 11),
    ("sjlt", 70),
    ("sjlt", 900),
    ("rademacher", 13),
    ("auto", None),
]
IDS = [f"{kind}-{dim}" for kind, dim in KINDS]


@pytest.fixture
def small_blocks(monkeypatch):
    """So that tiny weights have many, some of a part of a row."""
    monkeypatch.setattr(whole, "ENTRIES", 4 * 100)
    monkeypatch.setattr(whole, "SIGNS", 13 * 40)


def made(capture, kind, dim, seed=0):
    return projection_for(capture, kind, dim, seed, CPU, DOUBLE)


def projected(projection, dim, gradients):
    """By the matrix: what `of_dense` makes of each entry's basis vector, one parameter after the other."""
    if dim is None:
        return torch.stack([torch.cat([g.flatten() for g in own.values()]) for own in gradients])
    total = torch.zeros(len(gradients), projection.width, dtype=DOUBLE)
    for name in gradients[0]:
        g = torch.stack([own[name] for own in gradients])
        basis = torch.eye(g[0].numel(), dtype=DOUBLE)
        P_NF = projection.parameters[name].of_dense(basis.view(-1, *g[0].shape))
        block = projection.blocks.get(name, projection.blocks.get(""))
        total[:, block] += g.flatten(1) @ P_NF
    return total


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "dim"), KINDS, ids=IDS)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gpt2-lora", "llama-lora"])
def test_features_are_the_matrix_times_gradients(name, kind, dim):
    """By `autograd.grad`, and by `backward`."""
    model = build(name, dtype=DOUBLE)
    batch = collate(rows_for(name, 4))
    labels, parameters = batch.pop("labels"), trainable(model)
    projection = made(Capture(model), kind, dim)
    losses = language_model(model(**batch).logits, labels, None, 1)
    truth = projected(projection, dim, per_sample_gradients(losses, parameters))
    capture = Capture(model)
    with capture.attached(), capture.projecting(projection, Rows(4)) as taps:
        loss = language_model(model(**batch).logits, labels, None, 1).sum()
        gradients = torch.autograd.grad(loss, leaves(taps), allow_unused=True, retain_graph=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        loss.backward()
    found = features_of(taps, gradients)
    assert found.shape == (4, projection.width) and not found.requires_grad
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features_of(taps), found, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "dim"), KINDS, ids=IDS)
def test_features_of_runs(kind, dim):
    """Each kind of layer, in a model whose positions do not see one another; and each run in a batch of its own."""
    model, tokens, cotangent = every_layer(width=16, vocabulary=40)
    capture = Capture(model)
    projection = made(capture, kind, dim)
    lengths = [2, 7, 1, 10, 4]

    def features(tokens, cotangent, units):
        with capture.attached(), capture.projecting(projection, units) as taps:
            (torch.tanh(model(tokens)) * cotangent).sum().backward()
        return features_of(taps)

    found = features(tokens, cotangent, Runs(lengths, rows=4))
    losses = (torch.tanh(model(tokens)) * cotangent).sum(-1).flatten()
    sums = torch.stack([part.sum() for part in losses.split(lengths)])
    truth = projected(projection, dim, per_sample_gradients(sums, trainable(model)))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    alone = [
        features(own.unsqueeze(0), weights.unsqueeze(0), Rows(1))
        for own, weights in zip(tokens.flatten().split(lengths), cotangent.flatten(0, 1).split(lengths), strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), found, rtol=1e-9, atol=1e-9)


def of_matrices(kind, shape, width, seed):
    """P^T [N, F] of one parameter."""
    basis = torch.eye(math.prod(shape), dtype=DOUBLE).view(-1, *shape)
    if kind == "sjlt":
        return SparseMap(shape, width, Bits(seed, 7), CPU, DOUBLE).of_dense(basis)
    return DenseMap("w", shape, width, seed, CPU, DOUBLE).of_dense(basis)


@pytest.mark.parametrize("shape", [(6, 5), (3, 20), (30,), (7, 4)], ids=str)
@pytest.mark.parametrize("width", [8, 12, 64])
def test_a_sparse_matrix_has_one_sign_a_column(shape, width):
    """Entries of a piece have buckets of their own; those of other pieces meet as often as chance has it."""
    entries, draws = math.prod(shape), 400
    met = torch.zeros(entries, entries, dtype=DOUBLE)
    for seed in range(draws):
        P_NF = of_matrices("sjlt", shape, width, seed)
        assert ((P_NF != 0).sum(1) == 1).all() and (P_NF.abs().sum(1) == 1).all()
        met += (P_NF.abs() @ P_NF.abs().T) / draws
    right = shape[-1]
    height = width // right if len(shape) == 2 else 0
    numbers = torch.arange(entries)
    place = numbers // right // height if height else numbers // right * 100 + numbers % right // width
    together = place.unsqueeze(0) == place.unsqueeze(1)
    own = torch.eye(entries, dtype=torch.bool)
    assert not met[together & ~own].any() and (met[own] - 1).abs().max() < 1e-9
    others = met[~together]
    assert bool(len(others)) == (entries > width or (height > 0 and shape[0] > height))
    if len(others):
        spread = math.sqrt(1 / width / draws)
        assert (others - 1 / width).abs().max() < 6 * spread
        # A pair of pieces has one draw of its own, whatever its number of entries.
        pieces = len(place.unique())
        assert abs(others.mean() - 1 / width) < 5 * spread / math.sqrt(pieces * (pieces - 1) / 2)


STRUCTURES = ["dense", "low rank", "hot column", "hot row", "same"]


def structured(kind):
    """A pair of gradients [2, L, R] that have something in common."""
    generator = torch.Generator().manual_seed(3)
    g, u = torch.randn(2, 12, 10, generator=generator, dtype=DOUBLE)
    if kind == "low rank":
        g, u = g[:, :1] @ g[:1], u[:, :1] @ u[:1]
    elif kind == "hot column":
        g, u = 0.01 * g, 0.01 * u
        g[:, 3] += 1
        u[:, 3] += 2
    elif kind == "hot row":
        g, u = 0.01 * g, 0.01 * u
        g[5] += 1
        u[5] -= 1
    elif kind == "same":
        u = g
    return torch.stack([g, u + 0.5 * g])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("width", [7, 25])
def test_products_are_unbiased_and_no_noisier_than_of_signs(structure, width):
    """Over draws. The variance of both is known: sum_{i<j} p_ij (g_i u_j + g_j u_i)^2."""
    pair, draws = structured(structure), 1500
    g, u = pair.flatten(1)
    exact = g @ u
    cross = (torch.outer(g, u) + torch.outer(u, g)).square().triu(1)
    expected = cross.sum() / width
    found = {}
    for kind in ("sjlt", "rademacher"):
        products = []
        for seed in range(draws):
            if kind == "sjlt":
                own = SparseMap((12, 10), width, Bits(seed, 7), CPU, DOUBLE)
            else:
                own = DenseMap("w", (12, 10), width, seed, CPU, DOUBLE)
            first, second = own.of_dense(pair)
            products.append(first @ second)
        products = torch.stack(products)
        assert (products.mean() - exact).abs() < 4.5 * products.std() / math.sqrt(draws), kind
        # Of the variance's own error: its fourth moment's.
        error = (products - exact).square().std() / math.sqrt(draws)
        found[kind] = ((products - exact).square().mean(), error)
    variance, error = found["rademacher"]
    assert abs(variance - expected) < 4.5 * error
    variance, error = found["sjlt"]
    assert variance < expected + 4.5 * error


def test_logra_is_a_kronecker_product():
    model = build("gpt2", dtype=DOUBLE)
    projection = made(Capture(model), "logra", 600)
    narrow = 0
    for name, own in projection.parameters.items():
        shape, sides = own.plan.shape, own.plan.sides
        if not sides:
            assert len(shape) == 1
            continue
        assert math.prod(sides) == own.width and max(sides) <= 2 * min(sides)
        narrow += sides[0] < shape[0] and sides[1] < shape[1]
        P_NF = own.of_dense(torch.eye(math.prod(shape), dtype=DOUBLE).view(-1, *shape))
        # A rank-one rearrangement: [L, L'] by [R, R'].
        blocks = P_NF.view(*shape, *sides).permute(0, 2, 1, 3).reshape(shape[0] * sides[0], -1)
        assert torch.linalg.matrix_rank(blocks) == 1, name
        torch.testing.assert_close(P_NF.abs(), torch.full_like(P_NF, 1 / math.sqrt(own.width)))
    assert narrow == 10  # both tables, and four linear layers of two blocks
    assert projection.width <= 600 and projection.width > 540
    some = next(iter(projection.blocks.values()))
    assert some.start == 0 and max(own.stop for own in projection.blocks.values()) == projection.width


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "dim"), KINDS, ids=IDS)
def test_a_projection_is_made_anew_from_its_description(kind, dim):
    """And is a parameter's own, whatever trains beside it, and its seed's."""
    model = build("llama", dtype=DOUBLE)
    capture = Capture(model)
    projection = made(capture, kind, dim)
    u = {name: torch.randn(2, *p.shape, dtype=DOUBLE) for name, p in capture.parameters.items()}
    description = json.loads(json.dumps(projection.described()))
    again = described_projection(description, CPU, DOUBLE)
    assert torch.equal(again.of_dense(u), projection.of_dense(u))
    assert again.described() == projection.described()
    with pytest.raises(ValueError, match="projection version 1 cannot be compared"):
        described_projection({**description, "version": 1}, CPU, DOUBLE)
    if dim is None:
        return
    other = made(capture, kind, dim, seed=1)
    for name in capture.parameters:
        features = projection.parameters[name].of_dense(u[name])
        changed = other.parameters[name].of_dense(u[name])
        exact = features.shape[1] == u[name][0].numel()
        assert exact or not torch.equal(features, changed), name
    if kind != "logra":  # what shares its features out depends on who is there
        name = "model.layers.0.mlp.up_proj.weight"
        fewer = made(Capture(model, modules=["up_proj"]), kind, dim)
        assert torch.equal(fewer.parameters[name].of_dense(u[name]), projection.parameters[name].of_dense(u[name]))


class Products(TorchDispatchMode):
    """Multiplications that matrix products take, and the shapes of what comes of them."""

    def __init__(self):
        super().__init__()
        self.count, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        kinds = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.addmm.default: 1}
        if func in kinds:
            left, right = args[kinds[func]], args[kinds[func] + 1]
            self.count += left.numel() * right.shape[-1]
            self.shapes.add(tuple(output.shape[-2:]))
        return output


def test_no_weight_gradient_is_computed():
    """A backward pass to the taps takes the products of one to the activations, and those of the sides."""
    config = GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=300, n_positions=16, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    capture = Capture(model)
    projection = projection_for(capture, "logra", 28 * 16, 0, CPU, torch.float32)

    def products(backward, loss):
        with Products() as seen:
            backward(loss)
        return seen

    embedded = model.transformer.wte(tokens).detach().requires_grad_()
    model.requires_grad_(False)
    loss = model(inputs_embeds=embedded, labels=tokens).loss
    activations = products(lambda loss: torch.autograd.grad(loss, embedded), loss)
    model.requires_grad_(True)
    weights = products(lambda loss: loss.backward(), model(tokens, labels=tokens).loss)
    model.zero_grad(set_to_none=True)
    with capture.attached(), capture.projecting(projection, Rows(4)) as taps:
        loss = model(tokens, labels=tokens).loss
        seen = products(lambda loss: torch.autograd.grad(loss, leaves(taps)), loss)
    positions = tokens.numel()
    sides = 0
    for own in projection.parameters.values():
        if own.plan.sides:
            (left, right), (narrow, other) = own.plan.shape, own.plan.sides
            sides += positions * (narrow * other + left * narrow * (narrow < left) + right * other * (other < right))
    # The tied table's other use looks its left side up.
    narrow, other = projection.parameters["transformer.wte.weight"].plan.sides
    sides += positions * (narrow * other + 48 * other)
    assert activations.count < seen.count <= activations.count + sides < weights.count
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    assert weights.shapes & shapes and not seen.shapes & shapes


@pytest.mark.parametrize("structure", STRUCTURES)
def test_products_of_both_sides_are_unbiased(structure):
    """Their noise is that of each side, and of both: no entry's variance is counted on."""
    pair, draws = structured(structure), 3000
    products = []
    for seed in range(draws):
        first, second = SidedMap(Plan((12, 10), (4, 3), 12), Bits(seed), CPU, DOUBLE).of_dense(pair)
        products.append(first @ second)
    products = torch.stack(products)
    assert (products.mean() - (pair[0] * pair[1]).sum()).abs() < 4.5 * products.std() / math.sqrt(draws)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "dim"), KINDS, ids=IDS)
def test_batches_and_padding_do_not_matter(kind, dim):
    model = build("gpt2", dtype=DOUBLE)
    capture = Capture(model)
    projection = made(capture, kind, dim)
    rows = rows_for("gpt2", 5)

    def features(chosen):
        batch = collate(chosen)
        labels = batch.pop("labels")
        with capture.attached(), capture.projecting(projection, Rows(len(chosen))) as taps:
            loss = token_losses(model(**batch).logits, labels).sum()
            return features_of(taps, torch.autograd.grad(loss, leaves(taps)))

    torch.testing.assert_close(features(rows), torch.cat([features([row]) for row in rows]), rtol=1e-9, atol=1e-9)


def test_what_is_kept_is_a_bit_for_an_entry():
    own = SparseMap((400, 64), 512, Bits(0), CPU, torch.float32)
    kept = [x for x in vars(own._sketch).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in kept) == 400 * 64 // 8 + 8 * (400 // 8) + 8
    assert not any(isinstance(x, torch.Tensor) for x in vars(DenseMap("w", (400, 64), 512, 0, CPU, DOUBLE)).values())


def test_what_is_drawn_stays_as_it_is():
    """Bits, not draws of a library that may draw otherwise tomorrow: stored features are compared with new ones."""
    assert Bits(1, 2).bytes(6).tolist() == [194, 187, 172, 164, 183, 85]
    assert Bits(1, 2).below(10, 6).tolist() == [2, 1, 3, 9, 0, 2]
    numbers = torch.arange(1.0, 15.0, dtype=DOUBLE)
    rows = SparseMap((3, 4), 5, Bits(1, 2), CPU, DOUBLE).of_dense(numbers[:12].view(1, 3, 4))
    assert rows.tolist() == [[7.0, 17.0, -5.0, 0.0, 5.0]]
    cut = SparseMap((2, 7), 3, Bits(1, 2), CPU, DOUBLE).of_dense(numbers.view(1, 2, 7))
    assert cut.tolist() == [[-5.0, -24.0, 44.0]]
    signs = DenseMap("w", (2, 3), 4, 5, CPU, DOUBLE).of_dense(numbers[:6].view(1, 2, 3))
    assert signs.tolist() == [[-0.5, -1.5, 5.5, 5.5]]


def test_auto_goes_by_the_number_of_entries(monkeypatch):
    capture = Capture(build("llama"))
    entries = sum(p.numel() for p in capture.parameters.values())
    monkeypatch.setattr(kinds, "WHOLE_ENTRIES", entries)
    assert made(capture, "auto", 600).described()["kind"] == "sjlt"
    monkeypatch.setattr(kinds, "WHOLE_ENTRIES", entries - 1)
    assert made(capture, "auto", 600).described() == made(capture, "logra", 600).described()
    assert made(capture, "sjlt", None).width == entries


def test_refusals():
    capture = Capture(build("llama"))
    for kind, dim, says in (
        ("logra", 3, "projection_dim=3 is less than one feature for each of 21"),
        ("sjlt", 0, "projection_dim=0: give the number"),
        ("gaussian", 8, "projection='gaussian': choose"),
    ):
        with pytest.raises(ValueError, match=says):
            made(capture, kind, dim)
