"""Published methods to compare with: pure functions of a weight matrix and the second moment of its inputs."""
