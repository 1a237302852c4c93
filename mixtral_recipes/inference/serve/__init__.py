"""A model behind OpenAI's interface: requests are continued together, on this process or on all ranks of a layout."""
