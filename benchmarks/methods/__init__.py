"""The named methods beside independent implementations of each."""
