"""`python -m chorus`: the command `chorus`."""

from chorus.population.cli import main

if __name__ == "__main__":
    main()
