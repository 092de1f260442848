/**
 * The part of the uWebSockets.js API that we use, as in the official release. The republished build has its types
 * where TypeScript does not look for them, and names two functions differently there.
 */
declare module 'uWebSockets.js' {
  export type Payload = string | ArrayBuffer | Uint8Array;
  export type ListenSocket = { readonly listenSocket: unique symbol };
  export type SocketContext = { readonly socketContext: unique symbol };

  export interface WebSocket<T> {
    /** 1 sent, 0 buffered, 2 dropped at maxBackpressure. */
    send(message: Payload, isBinary?: boolean, compress?: boolean): number;
    sendFirstFragment(message: Payload, isBinary?: boolean, compress?: boolean): number;
    sendFragment(message: Payload, compress?: boolean): number;
    sendLastFragment(message: Payload, compress?: boolean): number;
    getBufferedAmount(): number;
    end(code?: number, reason?: Payload): void;
    close(): void;
    ping(message?: Payload): number;
    cork(callback: () => void): WebSocket<T>;
    getRemoteAddressAsText(): ArrayBuffer;
    getUserData(): T;
  }

  export interface HttpResponse {
    writeStatus(status: string): HttpResponse;
    writeHeader(name: string, value: string): HttpResponse;
    write(chunk: Payload): boolean;
    end(body?: Payload, closeConnection?: boolean): HttpResponse;
    endWithoutBody(reportedContentLength?: number, closeConnection?: boolean): HttpResponse;
    close(): HttpResponse;
    onAborted(handler: () => void): HttpResponse;
    onWritable(handler: (offset: number) => boolean): HttpResponse;
    onData(handler: (chunk: ArrayBuffer, isLast: boolean) => void): HttpResponse;
    getRemoteAddressAsText(): ArrayBuffer;
    cork(callback: () => void): HttpResponse;
    upgrade<T>(userData: T, key: string, protocol: string, extensions: string, context: SocketContext): void;
  }

  export interface HttpRequest {
    getHeader(lowerCaseName: string): string;
    getUrl(): string;
    getMethod(): string;
    getQuery(): string;
    forEachHeader(callback: (name: string, value: string) => void): void;
  }

  export interface WebSocketBehavior<T> {
    maxPayloadLength?: number;
    idleTimeout?: number;
    maxBackpressure?: number;
    compression?: number;
    sendPingsAutomatically?: boolean;
    upgrade?: (response: HttpResponse, request: HttpRequest, context: SocketContext) => void;
    open?: (socket: WebSocket<T>) => void;
    message?: (socket: WebSocket<T>, message: ArrayBuffer, isBinary: boolean) => void;
    drain?: (socket: WebSocket<T>) => void;
    ping?: (socket: WebSocket<T>, message: ArrayBuffer) => void;
    pong?: (socket: WebSocket<T>, message: ArrayBuffer) => void;
    close?: (socket: WebSocket<T>, code: number, message: ArrayBuffer) => void;
  }

  export interface TemplatedApp {
    ws<T>(pattern: string, behavior: WebSocketBehavior<T>): TemplatedApp;
    any(pattern: string, handler: (response: HttpResponse, request: HttpRequest) => void): TemplatedApp;
    listen(
      host: string,
      port: number,
      options: number,
      callback: (socket: ListenSocket | false) => void,
    ): TemplatedApp;
  }

  export interface TlsOptions {
    key_file_name?: string;
    cert_file_name?: string;
  }

  export function App(): TemplatedApp;
  export function SSLApp(options: TlsOptions): TemplatedApp;
  interface Library {
    App(): TemplatedApp;
    SSLApp(options: TlsOptions): TemplatedApp;
    LIBUS_LISTEN_EXCLUSIVE_PORT: number;
    DISABLED: number;
    /** Official names. */
    us_listen_socket_close?(socket: ListenSocket): void;
    us_socket_local_port?(socket: ListenSocket): number;
    /** The republished build's names of the same two. */
    closeSocket?(socket: ListenSocket): void;
    getSocketPort?(socket: ListenSocket): number;
  }
  const library: Library;
  export default library;
}
