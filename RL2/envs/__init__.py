"""The environments of `envs/`, as a part of the package: the files are links to those there."""
