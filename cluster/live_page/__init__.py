"""The live page: the deployment drawn in a browser, as it is now."""
