"""Getting datasets: where they are to be had, downloading them, unpacking their archives."""
