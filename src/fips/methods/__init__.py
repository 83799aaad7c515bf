"""How a group of layers is compressed: the solver in the metric of the output, the paper's recipe, other papers."""
