"""Print the memory per GPU of every default layout: the arithmetic by which the catalog's layouts were chosen."""

from mixtral_recipes.recipes.catalog import CATALOG, HARDWARE


def main() -> None:
    """Print every layout's footprint, with what the GPU holds."""
    for entry in CATALOG.values():
        for key, layout in entry.layouts.items():
            task, _, hardware = key.partition("@")
            found = entry.footprint(task, layout)
            print(
                f"{entry.name:18} {key:15} {layout.topology.world_size:4} GPUs  {layout.topology.describe():38} "
                f"w {found.weights:6.1f} g {found.gradients:6.1f} o {found.optimizer:6.1f} a {found.activations:6.1f} "
                f"= {found.total:6.1f} of {HARDWARE[hardware or 'h100'][0]} GB"
            )


if __name__ == "__main__":
    main()
