"""The typer commands: parse, call one function, print. The only room that prints or exits."""
