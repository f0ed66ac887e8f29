//! `whimbrel`: moves running virtual machines between hosts. Arguments in, words out.

mod agent_command;
mod args;
mod client;
mod doctor;
mod downtime;
mod forecast;
mod migrate;
mod pki_command;
mod progress;
mod report;
mod trouble;
mod vms;
mod words;

use agent::config::SOCKET;
use args::{Args, Command};
use clap::Parser;
use client::Client;
use std::process::ExitCode;
use trouble::Trouble;

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.command.json();
    match run(args) {
        Ok(code) => code,
        Err(trouble) => trouble.tell(json),
    }
}

fn run(args: Args) -> Result<ExitCode, Trouble> {
    let client = Client::new(args.socket.clone().unwrap_or_else(|| SOCKET.into()));
    match args.command {
        Command::Pki(pki) => pki_command::pki(&pki),
        Command::Doctor(doctor) => Ok(doctor::doctor(&doctor)?),
        Command::Agent(agent) => agent_command::agent(agent, args.socket),
        Command::Run(run) => vms::run(&client, &run),
        Command::Adopt(adopt) => vms::adopt(&client, &adopt),
        Command::List(list) => vms::list(&client, &list),
        Command::Show(show) => vms::show(&client, &show),
        Command::Stop(stop) => vms::stop(&client, &stop),
        Command::Plan(plan) => migrate::plan(&client, &plan),
        Command::Migrate(migrate) => migrate::migrate(&client, &migrate),
        Command::Status(status) => migrate::status(&client, &status),
        Command::Cancel(cancel) => migrate::cancel(&client, &cancel),
        Command::Resolve(resolve) => vms::resolve(&client, &resolve),
        Command::Watchdog => Ok(host::watchdog::watch()),
    }
}
