"""Files of prompts: kohya's syntax, read whole or refused with the line."""

import pytest

from derm_pipeline.generation.prompt_file import Prompt, parse_prompt, read_prompts

MELANOMA = (
    "photo of a detailed female skin, me1anoma on leg, at age 30, high res, high quality "
    "--n (low quality:1.4), watermark, text, blurry, cartoon, 3d --w 1024 --h 1024 --d 1 --l 12 --s 28"
)
"""lioga/melanoma-stable-diffusion's sample prompt: its words and settings; a negative prompt of its kinds."""


def test_the_sample_prompt_of_melanoma_stable_diffusion_is_read():
    assert parse_prompt(MELANOMA) == Prompt(
        text="photo of a detailed female skin, me1anoma on leg, at age 30, high res, high quality",
        negative_prompt="(low quality:1.4), watermark, text, blurry, cartoon, 3d",
        width_px=1024,
        height_px=1024,
        seed=1,
        guidance=12,
        num_steps=28,
    )


def test_a_line_may_say_less_in_any_order_and_dashes_within_words_stay():
    assert parse_prompt("  a well-defined nevus ") == Prompt(text="a well-defined nevus")
    assert parse_prompt("a nevus --s 9 --N dark, dull --L 3.5") == Prompt(
        text="a nevus", num_steps=9, negative_prompt="dark, dull", guidance=3.5
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--s 3", "text: String should have at least 1 character"),
        ("a nevus --x 3", "there is no option --x; there are --n, --w, --h, --d, --l, --s"),
        ("a nevus --steps 3", "there is no option --steps"),
        ("a nevus --s many", "--s 'many' is no int"),
        ("a nevus --s", "--s '' is no int"),
        ("a nevus --s 3 --s 4", "--s is said twice"),
        ("a nevus --s 0", "num_steps: Input should be greater than or equal to 1"),
        ("a nevus --l nan", "guidance: Input should be a finite number"),
        ("a nevus --d -1", "seed: Input should be greater than or equal to 0"),
        ("a nevus --w 64", "a width and a height: both, or neither"),
        ("a nevus --w 64 --h 9000000", "height_px: Input should be less than or equal to 8192"),
    ],
)
def test_what_is_no_prompt_is_refused(line, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_prompt(line)


def test_a_file_holds_one_a_line_beside_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"\ufeff# of the authors\n\n{MELANOMA}\r\na nevus --s 4\n", encoding="utf-8")
    assert read_prompts(path) == [parse_prompt(MELANOMA), parse_prompt("a nevus --s 4")]
    path.write_text("a nevus\n\n# ours\na nevus --q 1\n")
    with pytest.raises(ValueError, match=r"prompts\.txt, line 4: --q 1: there is no option --q"):
        read_prompts(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match=r"looked for in .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
