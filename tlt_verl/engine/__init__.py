"""Inside SGLang's scheduler: the algorithm TLT, its worker, exact verification."""
