"""The choices of options that have a fixed set of names.  Used by ``schema`` and all rooms."""

from enum import Enum


class Choice(str, Enum):
    """A choice that prints as its name."""

    __str__ = str.__str__


class AlgorithmName(Choice):
    """Federated algorithms, the rows of ``algorithms.ALGORITHMS``."""

    fedtan = "fedtan"
    fedavg = "fedavg"
    fedavg_gn = "fedavg_gn"
    fedavg_ln = "fedavg_ln"
    fedbn = "fedbn"
    silobn = "silobn"
    fixbn = "fixbn"
    fbn = "fbn"
    hbn = "hbn"
    centralised = "centralised"
    singleset = "singleset"


class OptimizerName(Choice):
    """Optimizers of the clients."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class LrScheduleName(Choice):
    """Ways in which the learning rate falls from round to round."""

    multistep = "multistep"
    cosine = "cosine"
    polynomial = "polynomial"


class StoppingMode(Choice):
    """Which values of a metric are better."""

    auto = "auto"
    min = "min"
    max = "max"


class ServerOptimizerName(Choice):
    """Optimizers of the server (FedOpt)."""

    none = "none"
    momentum = "momentum"
    adam = "adam"
    yogi = "yogi"


class TaskName(Choice):
    """Tasks: what a network is trained for."""

    classification = "classification"
    multilabel = "multilabel"
    segmentation = "segmentation"
    regression = "regression"
    vars()["import"] = "import"  # a keyword; import_ is the same choice in Python
    import_ = "import"


class DataName(Choice):
    """Data sets that ``datasets.load`` can load."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    mnist = "mnist"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    synthetic = "synthetic"
    folder = "folder"
    vars()["import"] = "import"  # a keyword; import_ is the same choice in Python
    import_ = "import"


class LoadingName(Choice):
    """Where the samples of a rank's clients lie during training."""

    auto = "auto"
    device = "device"
    stream = "stream"


class NormalisationName(Choice):
    """Sources of the mean and deviation that standardise pixels."""

    training = "training"
    imagenet = "imagenet"
    none = "none"


class ModelSource(Choice):
    """Origins of a network."""

    builtin = "builtin"
    torchvision = "torchvision"
    # A keyword cannot be assigned by name; import_ is the same choice in Python.
    vars()["import"] = "import"
    import_ = "import"


class ModelName(Choice):
    """Networks of this package."""

    mlp = "mlp"
    cnn = "cnn"
    resnet20 = "resnet20"
    resnet32 = "resnet32"
    resnet56 = "resnet56"
    vgg11_bn = "vgg11_bn"
    unet = "unet"


class NormName(Choice):
    """Layers that replace the BN layers of a network."""

    bn = "bn"
    gn = "gn"
    ln = "ln"
    none = "none"


class GammaName(Choice):
    """Initial values of gamma."""

    ones = "ones"
    uniform = "uniform"


class PartitionName(Choice):
    """Ways to divide the training samples among the clients."""

    iid = "iid"
    shards = "shards"
    dirichlet = "dirichlet"
    quantity = "quantity"
    feature_shift = "feature_shift"
    natural = "natural"


class ShiftName(Choice):
    """Transformations of a client's inputs in a feature shift."""

    rotation = "rotation"
    intensity = "intensity"


class SamplingName(Choice):
    """Ways in which a client draws its batches."""

    shuffled = "shuffled"
    replacement = "replacement"


class DeviceName(Choice):
    """Devices of the ranks."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class BackendName(Choice):
    """Backends of the collectives."""

    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"
    mpi = "mpi"


class ParticipationName(Choice):
    """Ways to draw the participants of a round."""

    uniform = "uniform"
    weighted = "weighted"


class PrecisionName(Choice):
    """Floating-point type of model and data; bfloat16 is that of large operations alone."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class TrackerName(Choice):
    """Trackers that follow a run."""

    tensorboard = "tensorboard"
    csv = "csv"
    wandb = "wandb"
    mlflow = "mlflow"


class RunDirMode(Choice):
    """Who may read the folder of a run that is made."""

    private = "private"
    group = "group"


class CohortMode(Choice):
    """Ways in which a rank runs the local steps of its clients."""

    auto = "auto"
    stacked = "stacked"
    sequential = "sequential"
