"""The command line of lopt-lite: it parses, calls one function of the package, and prints what came of it."""
