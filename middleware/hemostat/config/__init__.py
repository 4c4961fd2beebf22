"""The configuration: its sections (`schema`, `models`, `operation`), and where values come from (`loading`).

errors             errors of the configuration, explained in one line
fields             the types of the configuration's values, with their checks, and the base of its sections
loading            loads the configuration
models             the sections that name the models: upstream, reference, reasoning
operation          the sections that concern the processes themselves: ports, control, limits, log, tracing
packages           packages that a job needs in addition to Hemostat's own, and the commands that install them
prompt_lines       files of prompts, which settings and commands name
reasoning_parsers  vLLM's reasoning parsers by name, with the texts that enclose the thinking
reloading          rules for what a changed setting needs in order to take effect in a running instance (SIGHUP)
rendering          settings as a commented YAML file, from which `load` makes the same settings
schema             the configuration as a whole, and the sections of what is measured and learned
state_folder       the folder of this machine for what outlasts a process
store_url          addresses of stores (`store.url`)
text               the text of the errors of the configuration
waiting_times      the time that each figure and decision takes at the earliest, by the settings
"""
