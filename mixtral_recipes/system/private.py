"""What may be written down: names of settings known to be harmless, and text that gives away a password.

Whoever writes a value into a script, a record, a log or a report asks here first. A name that is not known is not
harmless: values under it go from environment to environment, or through a file only their owner can read.
"""

import re
from pathlib import PurePath

#: Settings of the libraries a job uses, in families and one by one. None of them is read as a secret.
_HARMLESS = re.compile(
    r"""
    (NCCL | CUDA | CUBLAS | CUBLASLT | CUDNN | NVTE | OMP | GOMP | KMP | MKL | OPENBLAS | GLOO | UCX | FI | TORCH |
    TORCHINDUCTOR | TORCHDYNAMO | PYTORCH | TRITON | LC | MIXTRAL_RECIPES)_\w+ |
    LANG | TZ | PATH | LD_LIBRARY_PATH | LIBRARY_PATH | CPATH | MANPATH | TMPDIR | TMP | TEMP | XDG_CACHE_HOME |
    XDG_CONFIG_HOME | XDG_DATA_HOME | PYTHONPATH | PYTHONUNBUFFERED | PYTHONHASHSEED | PYTHONWARNINGS |
    PYTHONFAULTHANDLER | PYTHONDONTWRITEBYTECODE | PYTHONUTF8 | PYTHONNOUSERSITE | PYTHONOPTIMIZE | PYTHONMALLOC
    | PYTHONIOENCODING | PYTHONPYCACHEPREFIX | LOGLEVEL | NO_COLOR | COLUMNS | NVIDIA_VISIBLE_DEVICES |
    NVIDIA_DRIVER_CAPABILITIES | NVIDIA_TF32_OVERRIDE | TOKENIZERS_PARALLELISM | NEMORUN_HOME |
    NUMEXPR_NUM_THREADS | HF_HOME | HF_HUB_CACHE | HF_HUB_OFFLINE | HF_HUB_ENABLE_HF_TRANSFER |
    HF_HUB_DISABLE_XET | HF_HUB_DOWNLOAD_TIMEOUT | HF_HUB_ETAG_TIMEOUT | HF_HUB_DISABLE_PROGRESS_BARS |
    HF_HUB_DISABLE_TELEMETRY | HF_ENDPOINT | HF_DATASETS_CACHE | HF_DATASETS_OFFLINE | HF_XET_CACHE |
    HF_ASSETS_CACHE | TRANSFORMERS_CACHE | TRANSFORMERS_OFFLINE | TRANSFORMERS_VERBOSITY | WANDB_MODE |
    WANDB_PROJECT | WANDB_ENTITY | WANDB_NAME | WANDB_NOTES | WANDB_TAGS | WANDB_RUN_GROUP | WANDB_JOB_TYPE |
    WANDB_DIR | WANDB_CACHE_DIR | WANDB_CONFIG_DIR | WANDB_DATA_DIR | WANDB_SILENT | WANDB_DISABLED |
    WANDB_BASE_URL | WANDB_RESUME | WANDB_RUN_ID | MLFLOW_TRACKING_URI | MLFLOW_EXPERIMENT_NAME | MLFLOW_RUN_ID
    | APPTAINER_CACHEDIR | APPTAINER_TMPDIR | SINGULARITY_CACHEDIR | SINGULARITY_TMPDIR | ENROOT_CACHE_PATH |
    ENROOT_DATA_PATH | HTTP_PROXY | HTTPS_PROXY | NO_PROXY | ALL_PROXY | SSL_CERT_FILE | SSL_CERT_DIR |
    REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SECRET_WORD = re.compile(
    r"""
    TOKEN | TOKENS | SECRET | SECRETS | PASSWORD | PASSWORDS | PASSWD | PASSPHRASE | PASS | PWD | PW | KEY |
    KEYS | APIKEY | PAT | CREDENTIAL | CREDENTIALS | CREDS | AUTH | JWT | COOKIE | SESSION | BEARER | DSN
    """,
    re.VERBOSE | re.IGNORECASE,
)
# scheme://user:password@host, or a token where the user stands; a short name alone (ssh://git@host) is not a secret.
_PASSWORD_IN_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#@]*:[^\s/?#@]+|[^\s/?#@:]{20,})@")

#: Files that hold keys and passwords by custom; an ``.env.example`` shows what belongs in one.
_KEY_FILE = re.compile(
    r"""
    \.env(\.(?!example|sample|template|dist)[^/]*)? | .*\.env | \.envrc | \.netrc | _netrc | \.pgpass | \.pypirc |
    \.npmrc | \.git-credentials | \.htpasswd | id_(rsa|dsa|ecdsa|ed25519)(_sk)? |
    .*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk) |
    credentials(\.json)? | service[-_]account.*\.json
    """,
    re.VERBOSE | re.IGNORECASE,
)
_KEY_FOLDER = re.compile(r"\.(ssh|aws|azure|gnupg|kube|docker)|\.config/gcloud", re.IGNORECASE)


def is_harmless(name: str) -> bool:
    """Whether the value of an environment variable of this name may be written where others can read it."""
    return bool(_HARMLESS.fullmatch(name)) and not sounds_secret(name)


def sounds_secret(name: str) -> bool:
    """Whether one of a name's words is one that secrets go by: ``GITHUB_PAT``, ``openai-key``, ``dbPassword``."""
    words = re.split(r"[^A-Za-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name))
    return any(map(_SECRET_WORD.fullmatch, words))


def holds_keys(path: PurePath) -> bool:
    """Whether a file holds keys or passwords, by its name or a folder it is in: it is copied nowhere."""
    folders = path.parent.as_posix()
    return bool(_KEY_FILE.fullmatch(path.name)) or any(
        _KEY_FOLDER.fullmatch(part) for part in (*path.parent.parts, "/".join(folders.split("/")[-2:]))
    )


def password_in(text: str) -> str | None:
    """The address in a text that carries a password or a token, without it; None if there is no such address."""
    found = _PASSWORD_IN_ADDRESS.search(text)
    return f"{found[1]}...@" if found else None


def without_passwords(text: str) -> str:
    """A text with dots in the place of every password in an address: libraries' errors repeat what they were given."""
    return _PASSWORD_IN_ADDRESS.sub(r"\1...@", text)
