"""Real tables of scikit-learn, divided among sites whose measuring devices differ.

python -m fedtan_hpc data=import data.target=fedtan_hpc.data.examples.tabular:tabular
"""

import numpy as np
import torch
from sklearn import datasets
from torch.utils.data import TensorDataset

from ..federated_data import FederatedData

_LOADERS = {
    "breast_cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
}


def tabular(
    seed: int, name: str = "breast_cancer", clients: int = 4, shift: float = 1.0
) -> FederatedData:
    """Returns a table whose rows are divided at random among the clients.

    Features are standardised over all rows.  Then each client's device gives each feature an offset
    and a scale, drawn for the client.  A fifth of a client's rows are its test samples.

    Args:
        seed: The job's option seed.
        name: breast_cancer (569 rows, 2 classes), wine (178, 3), or diabetes (442), whose target is
            a number to predict.
        clients: Number of sites.
        shift: How much the devices differ; 0 for not at all.

    Returns:
        Items of a float32 row of features and a target: an int64 class number, or for diabetes a
        float32 value, standardised over all rows.

    Raises:
        ValueError: There is no such table, or an argument is out of its range.
    """
    if name not in _LOADERS:
        raise ValueError(f"name is {name}, not {', '.join(_LOADERS)}")
    if clients < 1 or shift < 0:
        raise ValueError("clients is at least 1, shift at least 0")
    x_NF, y_N = _LOADERS[name](return_X_y=True)
    x_NF = (x_NF - x_NF.mean(0)) / x_NF.std(0)
    is_number = name == "diabetes"
    y_N = (y_N - y_N.mean()) / y_N.std() if is_number else y_N
    targets_N = torch.from_numpy(y_N).to(torch.float32 if is_number else torch.int64)
    rows = np.random.default_rng(seed).permutation(len(x_NF))
    sites = []
    for client, part in enumerate(np.array_split(rows, clients)):
        rng = np.random.default_rng((seed, client))
        scale_F, offset_F = 0.5 * shift * rng.standard_normal((2, x_NF.shape[1]))
        measured = torch.from_numpy(np.exp(scale_F) * x_NF[part] + offset_F).float()
        site, tests = (measured, targets_N[part]), len(part) // 5
        train = TensorDataset(*(each[tests:] for each in site))
        sites.append((train, TensorDataset(*(each[:tests] for each in site))))
    classes = None if is_number else len(np.unique(y_N))
    return FederatedData(None, clients=sites, classes=classes)
