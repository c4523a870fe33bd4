"""The named choices that options offer.  No torch."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """A named choice; it prints as its name."""

    __str__ = str.__str__


class AlgorithmName(Choice):
    """What is normalised with what: a row of ``algorithms.ALGORITHMS``."""

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


class ServerOptimizerName(Choice):
    """What the server makes of the clients' average (FedOpt)."""

    none = "none"
    momentum = "momentum"
    adam = "adam"
    yogi = "yogi"


class DataName(Choice):
    """Data sets that ``data.load`` knows."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    mnist = "mnist"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    synthetic = "synthetic"


class NormalisationName(Choice):
    """What makes pixels standardised inputs."""

    training = "training"
    imagenet = "imagenet"


class ModelSource(Choice):
    """Where a network comes from."""

    builtin = "builtin"
    torchvision = "torchvision"
    target = "target"


class ModelName(Choice):
    """Networks of this package."""

    mlp = "mlp"
    cnn = "cnn"
    resnet20 = "resnet20"
    resnet32 = "resnet32"
    resnet56 = "resnet56"
    vgg11_bn = "vgg11_bn"


class NormName(Choice):
    """What the network's BN layers become."""

    bn = "bn"
    gn = "gn"
    ln = "ln"
    none = "none"


class GammaName(Choice):
    """Initial scales of BN."""

    ones = "ones"
    uniform = "uniform"


class PartitionName(Choice):
    """Ways to share the training samples out among the clients."""

    iid = "iid"
    shards = "shards"
    dirichlet = "dirichlet"
    quantity = "quantity"
    feature_shift = "feature_shift"


class ShiftName(Choice):
    """What a feature shift does to a client's inputs."""

    rotation = "rotation"
    intensity = "intensity"


class SamplingName(Choice):
    """How a client draws its batches."""

    shuffled = "shuffled"
    replacement = "replacement"


class DeviceName(Choice):
    """Where a rank computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class BackendName(Choice):
    """Who carries the collectives."""

    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"
    mpi = "mpi"


class ParticipationName(Choice):
    """How a round's participants are drawn."""

    uniform = "uniform"
    weighted = "weighted"


class PrecisionName(Choice):
    """Floating-point type of model and data, or of the large operations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class CohortMode(Choice):
    """How a rank runs the local steps of its clients."""

    auto = "auto"
    stacked = "stacked"
    sequential = "sequential"
