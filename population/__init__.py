"""What all stages share: the population directory, its manifest, documents and tokens. Imports no other package of chorus."""
