"""Names of repositories on the Hugging Face Hub."""


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name: ``org/name``, or ``name`` alone; it is not asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
