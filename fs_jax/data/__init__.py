"""Images and labels as arrays in memory: TFDS's folders, scikit-learn's digits, or an `.npz`.

    dataset = load("cifar10", data_dir="~/tensorflow_datasets")
    dataset.train_images.shape, dataset.info.num_classes         # (50000, 32, 32, 3), 10

Nothing here needs TensorFlow. `prepare` writes a folder in TFDS's own format, and `load` reads such a folder, TFDS's
own too, in array_record or in tfrecord. CIFAR-10 is 184 MB of pixels: it is decoded once, kept in a cache that is
checked by its hash, and goes to the device whole. There is no input pipeline: `augmentation` crops and mirrors on the
device, inside the step.
"""

from fs_jax.data.preparation import prepare
from fs_jax.data.registry import DATASETS, info, load
from fs_jax.data.types import Bundled, DataInfo, Dataset, Derived, Published

__all__ = ["DATASETS", "Bundled", "DataInfo", "Dataset", "Derived", "Published", "info", "load", "prepare"]
