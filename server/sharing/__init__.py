"""How clients share what there is one of: the event loop, the memory for bodies, an answer that many ask for."""
