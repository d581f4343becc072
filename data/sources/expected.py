"""What generated data must hash to, everywhere.

After a change of a generator raise its version and write the hashes that
`python -m toolkit.data inspect data=NAME` and the error of a wrong sample print.
"""

from __future__ import annotations

MANIFESTS: dict[str, dict[str, str]] = {
    "scenes-8125c744c711": {
        "train": "12a4963daec539530482c118b18881723d58c97553ab624b1e894d5bb92fb9be",
        "val": "aedab27b19870f89466e2af5a231d97b26b23aed14b04c3efe0cc1b3ee3fd0ae",
        "test": "bfaf50c4ed94e21a8944ff085728809251f5e6d5d4ef0c6ae02e77d7b5d2bd40",
        "test_large": "904792582304fbc1d8f5c5f623206417b55dc63abbffd6641af89bc2338fe1ac",
    },
    # scale=tiny
    "scenes-35a346934a61": {
        "train": "80b2291e8acba259023743da39d0e57881a12afbaaf8bb0e3fe03e5c0a773294",
        "val": "82283e16e5015da50a3af8a76c10089f9807d090e18304b398bbff441629e5ad",
        "test": "ebdb75108298ec1a11acf5295f2a3632acba23cd8fdd7ceba1facdb29363f101",
        "test_large": "fc1278c4f8fc53fb7d394dd1730f235d012d6b19a01cfa3516fae026b91a12a5",
    },
    # scale=small
    "scenes-7aa22657bf92": {
        "train": "4dcc5f989388364f57b74f03248b263c9d491a30042003dfc4b15be1a40d4a82",
        "val": "70dba96603cc8e7625877711eca620ee98a0740da5c37286c9de981cd0c6538f",
        "test": "35998c343a517790a7b05d3941fa0ed6b9cff3531421a3da5c9dfc89c336a0dc",
        "test_large": "c63b50ee3c25d1e921c987ddc18ee0645b8d50e2399b5f3e783a820f385f9d7e",
    },
    "sort_of_clevr-24e1e2c91877": {
        "train": "fcf0b1e71c900ecbafefe11c836e328858b4a44b9a00d6fa0b28e7f2a056fded",
        "test": "84f51e4e9d1e80c3d564f1b522e355522bb08c447c7eb6f364738b02502ef7d4",
    },
}
"""Folder name (its end is the hash of version and options) -> split -> manifest hash."""

PROBES: dict[str, str] = {
    "scenes_shapes": "49b6a7209beeb4470ff05c748eea98e9ca305995359d7eecda3737aa7277c6ad",
    "scenes_digits": "3a3360ddb38982ac121dcbd4b12ac24cc84e86f309ed81d4b0dd11692fb728f1",
    "scenes_mixed": "ba54028a45b74cfbe294dea84a2dcb4462f5234d3306ee7377b742d860273705",
    "sort_of_clevr": "b86f69011e4323e40c36dad371f6824ac63bd3d32dad10211cd662a2c33256f8",
}
"""Name of a small fixed sample -> hash of its records."""
