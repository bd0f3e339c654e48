// Lets fork.go declare functions without bodies.
