"""How a group of MLPs is compressed: the paper's recipe, and the solver in the metric of the output."""
