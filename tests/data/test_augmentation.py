"""Crops are windows of the padded image; flips are mirror images; an image's augmentation depends only on its key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.data import augmentation

pytestmark = pytest.mark.usefixtures("small_programs")

# Jitted, as in training. One test compares with the functions outside jit.
augment = jax.jit(augmentation.augment, static_argnames=("padding", "flip"))
random_crop = jax.jit(augmentation.random_crop, static_argnames="padding")
random_flip = jax.jit(augmentation.random_flip)

KEY = jax.random.key(0)


def distinct(count, height, width, channels=1, dtype=np.float32):
    """Images with distinct pixels, none of them black, so that a window determines its position."""
    one = 1 + np.arange(height * width * channels).reshape(height, width, channels)
    return jnp.asarray(np.broadcast_to(one, (count, *one.shape)), dtype)


def windows(images, padding):
    """{(top, left): window} for all windows of the first image, with NumPy."""
    height, width = images.shape[1:3]
    framed = np.pad(images[0], ((padding, padding), (padding, padding), (0, 0)))
    steps = range(2 * padding + 1)
    return {(i, j): framed[i : i + height, j : j + width] for i in steps for j in steps}


def offset(image, table):
    matches = [place for place, window in table.items() if np.array_equal(window, image)]
    assert len(matches) == 1, "a crop is exactly one window of the padded image"
    return matches[0]


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 1), np.float32), ((5, 7, 3), np.uint8)])
def test_a_crop_is_a_window_of_the_padded_image(shape, dtype):
    images = distinct(50, *shape, dtype=dtype)
    crops = random_crop(KEY, images, padding=2)
    assert crops.shape == images.shape
    assert crops.dtype == dtype
    table = windows(np.asarray(images), 2)
    assert len({offset(crop, table) for crop in np.asarray(crops)}) > 10  # of 25


def test_all_windows_are_equally_likely():
    count = 4500
    images = distinct(count, 4, 4)
    table = windows(np.asarray(images), 1)
    found = [offset(crop, table) for crop in np.asarray(random_crop(KEY, images, padding=1))]
    counts = np.array([found.count(place) for place in table])
    # Binomial with p = 1/9: 500 expected, standard deviation 21; five standard deviations.
    np.testing.assert_allclose(counts, count / 9, atol=5 * np.sqrt(count * 8 / 81))


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_flip_exchanges_left_and_right_exactly(dtype):
    images = distinct(20, 4, 6, 3, dtype=dtype)
    flipped = np.asarray(random_flip(KEY, images))
    assert flipped.dtype == dtype
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, np.asarray(images), strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(flipped, np.asarray(images), strict=True)]
    assert any(mirrored)
    assert any(kept)
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))


def test_half_of_the_images_are_flipped():
    count = 10_000
    flipped = random_flip(KEY, distinct(count, 1, 2))[:, 0, 0, 0] == 2
    # Binomial with p = 1/2: standard deviation sqrt(n)/2 = 50; five standard deviations.
    assert abs(int(flipped.sum()) - count / 2) < 5 * np.sqrt(count) / 2


def test_crop_and_flip_are_independent():
    count = 3600
    images = distinct(count, 4, 4)
    table = windows(np.asarray(images), 1)
    # The mirror image of a window is not a window, as all pixels are distinct.
    mirrored = {place: window[:, ::-1] for place, window in table.items()}
    every = {(place, flip): w for flip, t in enumerate((table, mirrored)) for place, w in t.items()}
    found = [offset(image, every) for image in np.asarray(augment(KEY, images, padding=1, flip=True))]
    counts = np.array([found.count(outcome) for outcome in every])
    # Binomial with p = 1/18: 200 expected, standard deviation 14; five standard deviations.
    np.testing.assert_allclose(counts, count / 18, atol=5 * np.sqrt(count * 17 / 18**2))


def test_augmentation_does_not_depend_on_the_batch_or_the_number_of_devices():
    images = jax.random.uniform(KEY, (6, 8, 8, 3))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))  # the keys that are derived from a single key
    function = functools.partial(augment, padding=4, flip=True)
    whole = function(KEY, images)
    shared = jax.vmap(function)(keys.reshape(3, 2), images.reshape(3, 2, 8, 8, 3))
    np.testing.assert_array_equal(whole, shared.reshape(whole.shape))


def test_augmentation_is_the_same_in_64_bit_mode():
    images = distinct(16, 8, 8, dtype=np.uint8)
    usual = augment(KEY, images, padding=2, flip=True)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(augment(KEY, images, padding=2, flip=True), usual)


def test_augmentation_in_a_loop_under_pmap_is_the_same():
    images = distinct(6, 8, 8)
    function = functools.partial(augmentation.augment, padding=1, flip=True)

    def steps(key, images):
        return jax.lax.fori_loop(0, 3, lambda i, _: function(jax.random.fold_in(key, i), images), images)

    last = function(jax.random.fold_in(KEY, 2), images)  # outside jit
    np.testing.assert_array_equal(last, jax.pmap(steps)(KEY[None], images[None])[0])


def test_no_padding_and_no_flip_is_the_identity():
    images = jax.random.uniform(KEY, (4, 8, 8, 3))
    np.testing.assert_array_equal(augment(KEY, images, padding=0, flip=False), images)
    np.testing.assert_array_equal(random_crop(KEY, images, padding=0), images)


@pytest.mark.parametrize(("images", "rng", "padding", "error", "message"), [
    (np.ones((8, 8, 3)), KEY, 1, ValueError, r"images: expected shape \[N, height, width, channels\]; got \(8, 8, 3\)"),
    (np.ones((2, 8, 8, 3), np.int32), KEY, 1, TypeError, "images: expected floating point or uint8; got int32"),
    (np.ones((2, 8, 8, 3)), KEY, -1, ValueError, "padding: expected an integer of at least 0; got -1"),
    (np.ones((2, 8, 8, 3)), KEY, 1.5, TypeError, "padding: expected an integer of at least 0; got 1.5"),
    (np.ones((2, 8, 8, 3)), jax.random.split(KEY, 3), 1, ValueError, "rng: .* one for each of the 2 images"),
])  # fmt: skip
def test_invalid_input_raises_an_error(images, rng, padding, error, message):
    with pytest.raises(error, match=message):
        augmentation.augment(rng, images, padding=padding, flip=True)
