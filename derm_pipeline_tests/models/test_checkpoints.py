import argparse
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from derm_pipeline.models.checkpoints import CLASS_TABLE, load_public_checkpoint, save_public_checkpoint
from derm_pipeline.models.dit import DiT, DiTConfig

SMALL = DiTConfig(latent_size=4, width=32, depth=2, heads=2, conditions={"diagnosis": 7}, learn_sigma=True)


def random_dit(seed: int, **changes) -> DiT:
    torch.manual_seed(seed)
    model = DiT(DiTConfig.model_validate(SMALL.model_dump() | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def copied(model: DiT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def assert_refused(path, model, *words, **options):
    """The file is refused with these words, and the model is untouched."""
    before = copied(model)
    with pytest.raises(ValueError, match=".*".join(words)):
        load_public_checkpoint(path, model, **options)
    assert_same(model.state_dict(), before)


class Evil:
    """What a pickle can hold: a command that is run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_saved_loads_to_the_last_bit(tmp_path, suffix):
    model, other = random_dit(1), random_dit(2)
    save_public_checkpoint(tmp_path / f"dit{suffix}", model)
    loaded = load_public_checkpoint(tmp_path / f"dit{suffix}", other)
    assert_same(other.state_dict(), model.state_dict())
    assert (loaded.weights, loaded.num_loaded, loaded.fresh) == ("only", len(model.state_dict()), ())
    assert [path.name for path in tmp_path.iterdir()] == [f"dit{suffix}"]


def test_a_saved_pt_is_what_the_public_code_reads(tmp_path):
    """facebookresearch/DiT: `torch.load`, then "ema" if there is one, then `load_state_dict`."""
    model, averaged = random_dit(1), random_dit(2)
    save_public_checkpoint(tmp_path / "plain.pt", model)
    save_public_checkpoint(tmp_path / "both.pt", model, ema=averaged.state_dict())
    assert_same(torch.load(tmp_path / "plain.pt", weights_only=True), model.state_dict())
    assert_same(torch.load(tmp_path / "both.pt", weights_only=True)["ema"], averaged.state_dict())


@pytest.mark.parametrize(("asked", "seed"), [("ema", 2), ("model", 1)])
def test_a_trainers_checkpoint_gives_the_weights_that_are_asked_for(tmp_path, asked, seed):
    """fast-DiT's files: model, ema, the optimiser's state and the arguments."""
    model = random_dit(1)
    optimiser = torch.optim.AdamW(model.parameters())
    model.x_embedder.proj.weight.sum().backward()
    before = copied(model)
    optimiser.step()
    torch.save(
        {
            "model": before,
            "ema": random_dit(2).state_dict(),
            "opt": optimiser.state_dict(),
            "args": argparse.Namespace(model="DiT-XL/2", epochs=1400, results_dir="results"),
        },
        tmp_path / "0050000.pt",
    )
    other = random_dit(3)
    assert load_public_checkpoint(tmp_path / "0050000.pt", other, weights=asked).weights == asked
    assert_same(other.state_dict(), random_dit(seed).state_dict())


def test_where_a_file_holds_one_of_them_that_is_taken_and_said(tmp_path):
    torch.save({"model": random_dit(1).state_dict()}, tmp_path / "dit.pt")
    assert load_public_checkpoint(tmp_path / "dit.pt", random_dit(2), weights="ema").weights == "model"


def test_half_precision_files_keep_the_models_precision(tmp_path):
    torch.save({name: value.half() for name, value in random_dit(1).state_dict().items()}, tmp_path / "dit.pt")
    model = random_dit(2)
    load_public_checkpoint(tmp_path / "dit.pt", model)
    assert model.x_embedder.proj.weight.dtype == torch.float32
    torch.testing.assert_close(model.x_embedder.proj.weight, random_dit(1).x_embedder.proj.weight, rtol=1e-3, atol=1e-3)


def test_a_wrong_file_is_refused_with_the_names_that_differ_and_nothing_changes(tmp_path):
    state = random_dit(1).state_dict()
    del state["blocks.1.attn.qkv.weight"]
    state["t_embedder.mlp.2.bias"] = torch.zeros(33)
    torch.save(state | {"blocks.1.attn.query.weight": torch.zeros(3)}, tmp_path / "dit.pt")
    assert_refused(
        tmp_path / "dit.pt",
        random_dit(2),
        r"1 missing \(blocks.1.attn.qkv.weight\)",
        r"1 unexpected \(blocks.1.attn.query.weight\)",
        r"1 of another shape \(t_embedder.mlp.2.bias \(33,\), here \(32,\)\)",
    )


def test_long_lists_of_names_are_cut_and_counted(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1, depth=1))
    assert_refused(tmp_path / "dit.pt", random_dit(2), r"10 missing \(blocks.1.adaLN_modulation.1.bias", "and 6 more")


def test_other_classes_are_refused_unless_asked_for_and_then_only_the_null_row_is_taken(tmp_path):
    imagenet = random_dit(1, conditions={"label": 1000})
    save_public_checkpoint(tmp_path / "dit.pt", imagenet)
    model = random_dit(2)
    before = copied(model)
    assert_refused(tmp_path / "dit.pt", model, r"\(1001, 32\), here \(8, 32\)", r"fresh=\['y_embedder'\]")
    loaded = load_public_checkpoint(tmp_path / "dit.pt", model, fresh=("y_embedder",))
    assert loaded.fresh == (CLASS_TABLE,)
    assert loaded.num_loaded == len(before) - 1
    state, there = model.state_dict(), imagenet.state_dict()
    assert torch.equal(state[CLASS_TABLE][:7], before[CLASS_TABLE][:7])
    assert torch.equal(state[CLASS_TABLE][7], there[CLASS_TABLE][1000])
    assert_same({n: v for n, v in state.items() if n != CLASS_TABLE}, {n: there[n] for n in state if n != CLASS_TABLE})


def test_a_model_that_is_told_more_takes_the_rest(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1))
    model = random_dit(2, conditions={"diagnosis": 7, "site": 20}, text_tokens=3, text_width=5)
    table, null = model.extra_embedders["site"].embedding_table.weight.clone(), model.text_embedder.null.clone()
    assert_refused(tmp_path / "dit.pt", model, "extra_embedders", r"fresh=\['extra_embedders', 'text_embedder'\]")
    load_public_checkpoint(tmp_path / "dit.pt", model, fresh=("extra_embedders", "text_embedder"))
    assert torch.equal(model.extra_embedders["site"].embedding_table.weight, table)
    assert torch.equal(model.text_embedder.null, null)
    assert torch.equal(model.y_embedder.embedding_table.weight, random_dit(1).y_embedder.embedding_table.weight)


def test_another_latent_size_keeps_its_own_position_table(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1))
    model = random_dit(2, latent_size=8)
    table = model.pos_embed.clone()
    assert_refused(tmp_path / "dit.pt", model, r"pos_embed \(1, 4, 32\), here \(1, 16, 32\)", r"fresh=\['pos_embed'\]")
    load_public_checkpoint(tmp_path / "dit.pt", model, fresh=("pos_embed",))
    assert torch.equal(model.pos_embed, table)


def test_rotary_positions_are_not_mixed_with_a_table_unawares(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1))
    assert_refused(tmp_path / "dit.pt", random_dit(2, positions="rotary"), "rotary", "pos_embed")
    load_public_checkpoint(tmp_path / "dit.pt", random_dit(2, positions="rotary"), fresh=("pos_embed",))


def test_a_part_that_the_model_does_not_have_cannot_stay_fresh(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1))
    assert_refused(tmp_path / "dit.pt", random_dit(2), "'label_embedder'", "y_embedder", fresh=("label_embedder",))


def test_another_number_of_heads_is_refused_where_the_file_tells_it(tmp_path):
    save_public_checkpoint(tmp_path / "dit.safetensors", random_dit(1))
    assert_refused(tmp_path / "dit.safetensors", random_dit(2, heads=4), "2 heads", "has 4")


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    state = copied(random_dit(1))
    state["final_layer.linear.bias"][3] = torch.nan
    torch.save(state, tmp_path / "dit.pt")
    assert_refused(tmp_path / "dit.pt", random_dit(2), "final_layer.linear.bias", "not finite")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(32, dtype=torch.int64),
        torch.zeros(32).to_sparse(),
        torch.zeros(32, device="meta"),
        "words",
        {"nested": torch.zeros(32)},
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, value):
    torch.save(random_dit(1).state_dict() | {"t_embedder.mlp.2.bias": value}, tmp_path / "dit.pt")
    assert_refused(tmp_path / "dit.pt", random_dit(2), "t_embedder.mlp.2.bias")


@pytest.mark.parametrize("held", ["beside", "inside", "bare", "legacy"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, held):
    trap, path = tmp_path / "trap", tmp_path / "dit.pt"
    state = random_dit(1).state_dict()
    if held == "beside":
        torch.save({"model": state, "args": Evil(trap)}, path)
    elif held == "inside":
        torch.save(state | {"pos_embed": Evil(trap)}, path)
    elif held == "bare":
        path.write_bytes(pickle.dumps(Evil(trap)))
    else:
        torch.save(Evil(trap), path, _use_new_zipfile_serialization=False)
    assert_refused(path, random_dit(2), "mkdir" if held in ("beside", "inside") else "no file of torch.save's")
    assert not trap.exists()
    if held == "beside":
        torch.load(path, weights_only=False)
        assert trap.exists(), "the trap is real"


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_refused_as_such_or_still_fits(tmp_path):
    save_public_checkpoint(tmp_path / "dit.pt", random_dit(1))
    whole = (tmp_path / "dit.pt").read_bytes()
    head = whole.index(b"PK", 4)  # up to here lies the pickle
    generator = torch.Generator().manual_seed(5)
    model, refused = random_dit(2), 0
    for _ in range(200):
        broken = bytearray(whole)
        for place in torch.randint(head, (3,), generator=generator):
            broken[place] = int(torch.randint(256, (1,), generator=generator))
        (tmp_path / "broken.pt").write_bytes(broken)
        try:
            load_public_checkpoint(tmp_path / "broken.pt", model)
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_files_cut_short_empty_or_of_another_kind_are_refused_by_name(tmp_path, name):
    save_public_checkpoint(tmp_path / name, random_dit(1))
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, random_dit(2), name.replace(".", r"\."))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert_refused(tmp_path / "other.pt", random_dit(2), "other.pt is broken")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_public_checkpoint(tmp_path / "nowhere.pt", random_dit(2))


def test_a_file_without_names_is_refused(tmp_path):
    for content in ([torch.zeros(3)], {}, {0: torch.zeros(3)}, {"model": torch.zeros(3)}):
        torch.save(content, tmp_path / "dit.pt")
        assert_refused(tmp_path / "dit.pt", random_dit(2), "no weights by name")


def test_safetensors_of_others_load_too(tmp_path):
    save_file(copied(random_dit(1)), tmp_path / "dit.safetensors")
    model = random_dit(2)
    load_public_checkpoint(tmp_path / "dit.safetensors", model)
    assert_same(model.state_dict(), random_dit(1).state_dict())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"conditions": {"diagnosis": 7, "sex": 2}}, "condition sex"),
        ({"qk_norm": True}, "qk_norm"),
        ({"positions": "rotary"}, "rotary"),
        ({"text_tokens": 3, "text_width": 5}, "text"),
    ],
)
def test_a_variant_is_not_written_as_the_public_dit(tmp_path, changes, word):
    with pytest.raises(ValueError, match=word):
        save_public_checkpoint(tmp_path / "dit.pt", random_dit(1, **changes))
    assert not list(tmp_path.iterdir())


def test_saving_refuses_other_endings_and_strange_averages(tmp_path):
    with pytest.raises(ValueError, match=r"dit\.bin"):
        save_public_checkpoint(tmp_path / "dit.bin", random_dit(1))
    with pytest.raises(ValueError, match="blocks.9"):
        save_public_checkpoint(tmp_path / "dit.pt", random_dit(1), ema={"blocks.9": torch.zeros(1)})
