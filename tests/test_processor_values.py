"""What processors return beside pixels and say of themselves, in every form in which they do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from srpo_core.processor_values import (
    Sides,
    image_facts,
    image_token_id_of,
    refuse_unknown_pixels,
    sides,
    vision_patch_size,
    where_images_are,
    whole_number,
)


def test_image_facts_of_a_processor_and_of_an_image_processor():
    images = SimpleNamespace(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    for processor in (images, SimpleNamespace(image_processor=images, tokenizer=None)):
        assert image_facts(processor) == ([0.5] * 3, [0.2] * 3, 2, 2)
    images.merge_size, images.temporal_patch_size = 4, 1
    assert image_facts(images) == ([0.5] * 3, [0.2] * 3, 4, 1)
    images.do_normalize = False  # it rescales to [0, 1] only
    assert image_facts(images)[:2] == (0.0, 1.0)


def test_image_facts_of_a_tokenizer_are_none_and_of_half_a_processor_an_error():
    assert image_facts(SimpleNamespace(eos_token_id=0)) is None
    assert image_facts(SimpleNamespace(image_processor=None)) is None
    with pytest.raises(ValueError, match="SimpleNamespace has no image_mean and image_std, so black is not known"):
        image_facts(SimpleNamespace(do_normalize=True, image_mean=None, image_std=[0.2] * 3))


def test_image_facts_of_any_form():
    for form in (tuple, list, np.array, torch.tensor):
        images = SimpleNamespace(image_mean=form([0.5] * 3), image_std=form([0.25] * 3), merge_size=np.int64(2))
        assert image_facts(images) == ([0.5] * 3, [0.25] * 3, 2, 2)  # without do_normalize: it has what to do it with
    assert image_facts(SimpleNamespace(do_normalize=None, image_mean=[0.5], image_std=[0.5]))[:2] == (0.0, 1.0)
    assert image_facts(SimpleNamespace(do_normalize=True, image_mean=0.5, image_std=np.float32(0.5)))[:2] == (0.5, 0.5)
    assert image_facts(SimpleNamespace(do_normalize=False, merge_size=None, downsample_factor=4)).merge_size == 4
    with pytest.raises(ValueError, match="image_mean must be one number or one for each channel, got 'half'"):
        image_facts(SimpleNamespace(do_normalize=True, image_mean="half", image_std=0.5))
    with pytest.raises(ValueError, match=r"merge_size must be one whole number, .* got \[1, 2\]"):
        image_facts(SimpleNamespace(do_normalize=False, merge_size=[1, 2]))


def test_vision_patch_size_of_objects_and_dicts():
    for size in (14, (14, 14), [14, 14], {"height": 14, "width": 14}):
        for vision in ({"patch_size": size}, SimpleNamespace(patch_size=size)):
            for config in ({"vision_config": vision}, SimpleNamespace(vision_config=vision)):
                assert vision_patch_size(config) == Sides(14, 14)
    assert vision_patch_size(SimpleNamespace()) is vision_patch_size({"vision_config": {}}) is None
    assert vision_patch_size(SimpleNamespace(vision_config=None)) is vision_patch_size(None) is None
    with pytest.raises(ValueError, match=r"vision_config.patch_size must be .* got \[7, 3, 3, 3\]"):
        vision_patch_size({"vision_config": {"patch_size": [7, 3, 3, 3]}})


def test_image_token_id_of_finds_either_name_and_says_who_needs_it():
    for name in ("image_token_id", "image_token_index"):
        assert image_token_id_of(SimpleNamespace(**{name: 7, "model_type": "x"})) == 7
    nameless = SimpleNamespace(model_type="nameless", image_token_id=None)
    assert image_token_id_of(nameless) is None
    with pytest.raises(ValueError, match=r"^corruption='none' has to know .* config of 'nameless' has neither"):
        image_token_id_of(nameless, needed_by="corruption='none'")


def test_sides_and_whole_numbers_are_at_least_one():
    assert sides("patch_size", (8, 16)) == (8, 16)
    for wrong in (0, -1, (14, 0)):
        with pytest.raises(ValueError, match="patch_size must be at least 1"):
            sides("patch_size", wrong)
    assert whole_number("merge_size", torch.tensor([2])) == whole_number("merge_size", {"height": 2, "width": 2}) == 2
    with pytest.raises(ValueError, match="merge_size must be at least 1, got 0"):
        whole_number("merge_size", 0)


def test_where_images_are_in_each_layout():
    inputs = {
        "image_grid_thw": [[1, 2, 2]],
        "video_grid_thw": torch.tensor([[2, 2, 2]]),
        "image_sizes": np.array([[5, 6]]),
        "spatial_shapes": torch.tensor([[1, 2]]),
        "input_ids": torch.zeros(1, 3),
    }

    def found(name, *shape):
        return {key: value.tolist() for key, value in where(name, *shape).items()}

    def where(name, *shape):
        return where_images_are(name, torch.zeros(*shape), inputs)

    assert found("pixel_values", 4, 192) == {"image_grid_thw": [[1, 2, 2]]}
    assert found("pixel_values_videos", 8, 192) == {"image_grid_thw": [[2, 2, 2]]}
    assert found("pixel_values", 1, 4, 192) == {"spatial_shapes": [[1, 2]]}
    assert found("pixel_values", 1, 3, 8, 8) == {"image_sizes": [[5, 6]]}
    assert where("pixel_values", 1, 2, 3, 8, 8) == {}  # sizes from before the image was cut into tiles
    assert where("pixel_values_videos", 1, 2, 3, 8, 8) == {"second_axis": "frames"}
    with pytest.raises(ValueError, match="image_position_ids must number the patches of an image in reading order"):
        where_images_are(
            "pixel_values", torch.zeros(1, 2, 192), {"image_position_ids": torch.tensor([[[1, 0], [0, 0]]])}
        )


def test_refuse_unknown_pixels_names_them_and_leaves_everything_else():
    pixels = torch.zeros(1, 3, 8, 8)
    refuse_unknown_pixels({"pixel_values": pixels, "pixel_values_videos": pixels, "input_features": pixels})
    refuse_unknown_pixels({"image_sizes": torch.ones(1, 2).long(), "image_attention_mask": torch.ones(1, 2)})
    refuse_unknown_pixels({"video_second_per_grid": torch.ones(1), "images_seqlens": [1], "image_grid_thw": None})
    for name, value in (
        ("image_pixel_values", pixels),
        ("images", [pixels]),
        ("high_res_pixel_values", pixels.numpy()),
        ("pixel_values_images", pixels.byte()),
    ):
        with pytest.raises(ValueError, match=f"^{name} seems to hold images"):
            refuse_unknown_pixels({"pixel_values": pixels, name: value})
